"""Tests run one thread each: on small matrices the threads of LAPACK cost more than they save, and runs are parallel.

The package pins nothing; what users' own threads cost is measured in tests/benchmarks.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402  # the libraries read these when they are loaded

torch.set_num_threads(1)
