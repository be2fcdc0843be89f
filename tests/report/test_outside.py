"""A share that is only known to be at least something is not told as if it were all."""

from __future__ import annotations

import pytest

from stabkit.report.schema import outside
from tests.report.synthetic import make_step


@pytest.mark.parametrize(
    ("told", "method", "z", "share", "skip"),
    [
        (">0%", "krylov", (0.5 + 0j, -2.5 + 0j), 2 / 16384, 1.0),
        (">12%", "krylov", (0.5 + 0j,), 0.125, 1.0),
        ("<1%", "krylov", (0.5 + 0j, -0.5 + 0j), 1 / 16384, 1.0),
        ("0%", "krylov", (0.5 + 0j,), 0.0, 0.0),
        ("100%", "dense", (0.5 + 0j, 1j), 1.0, 1.0),
        ("-", "none", None, None, None),
    ],
)
def test_a_share_of_eigenvalues(told, method, z, share, skip):
    step = make_step(0, z=z, skip=skip, outside_share=share, spectrum_method=method)
    assert outside(step) == told
