"""Runs of operations that are repeated one after the other: where layers may lie that no module tells of."""

from __future__ import annotations

#: Products with matrices and their inverses, and sums over the neighbours in a graph: what a layer does once or twice.
PRODUCTS = ("Addmm", "Mm", "Bmm", "Convolution", "IndexAdd", "ScatterAdd", "SparseMm", "SparseAddmm", "LinalgSolve")
#: What adds up entries without a matrix: messages that are passed on, couplings that are normalised.
REDUCTIONS = ("Sum", "Mean", "Logsumexp", "Softmax", "LogSoftmax", "Amax", "Max", "LinalgVectorNorm")


def tandem_repeat(names: list[str]) -> tuple[int, int, int] | None:
    """The longest run of one period of operations, at least three times over: first position, period, count."""
    weights = [i for i, name in enumerate(names) if name.startswith(PRODUCTS)]
    periods = sorted({b - a for lag in (1, 2, 3, 4) for a, b in zip(weights, weights[lag:], strict=False)})
    best: tuple[int, int, int] | None = None
    for period in periods:
        first = 0
        while first + period < len(names):
            last = first
            while last + period < len(names) and names[last] == names[last + period]:
                last += 1
            count = (last - first) // period + 1
            works = any(name.startswith(PRODUCTS) for name in names[first : first + period])
            if count >= 3 and works and (best is None or count * period > 1.15 * best[1] * best[2]):
                best = (first, period, count)
            first = max(last, first) + 1
    return best
