"""One million points of z against a method: stability and amplification, beside the naive ways to the same numbers.

Run with ``python tests/benchmarks/integrators.py``. The floor is one pass of numpy over the stability polynomial; the
naive way is one LAPACK eigenvalue call for each companion matrix, timed on fewer points and scaled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from stabkit import integrators

POINTS = 1_000_000
SAMPLE = 50_000
REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    rng = np.random.default_rng(0)
    z = rng.uniform(-4, 2, POINTS) + 1j * rng.uniform(-4, 4, POINTS)
    few = z[:SAMPLE]
    print(f"{POINTS:,} points, seconds (median of {REPEATS}, smallest to largest)")
    for name in ("rk4", "ab4", "bdf5"):
        method = integrators.named(name)
        method.is_stable(few)  # the characteristic polynomial is computed once
        N = method.characteristic.coefficients[0]
        work: dict[str, tuple[Callable[[], object], float]] = {
            "is_stable": (lambda m=method: m.is_stable(z), 1),
            "amplification": (lambda m=method: m.amplification(z), 1),
            "floor: one polynomial": (lambda N=N: np.abs(np.polynomial.polynomial.polyval(z, N)), 1),
            "naive: eigenvalues": (
                lambda m=method: np.abs(np.linalg.eigvals(m.stability_matrix(few))).max(axis=-1),
                POINTS / SAMPLE,
            ),
        }
        times: dict[str, list[float]] = {label: [] for label in work}
        for _ in range(REPEATS):  # interleaved, so that a busy neighbour slows all of them
            for label, (call, factor) in work.items():
                times[label].append(factor * seconds(call))
        for label, values in times.items():
            middle = statistics.median(values)
            ratio = middle / statistics.median(times["is_stable"])
            print(f"  {name:5} {label:22} {middle:7.3f}  ({min(values):.3f} to {max(values):.3f})  x{ratio:.2f}")


if __name__ == "__main__":
    main()
