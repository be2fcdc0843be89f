"""Several stages that are always evaluated together, at one argument: one field, composed of them.

A transformer layer f(x) = a(x) + m(x + a(x)) is such a field. Where it is evaluated at several arguments, or its result
enters several states, the tableau of a and m is that of f with every number replaced by a small block.
"""

from __future__ import annotations

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix

_CLOSE = 1e-6  # coefficients of single precision networks


def with_composite_fields(found: Blocks) -> Blocks | None:
    """The tableau with all its fields taken as one that is composed of them; None where they do not make one.

    Of a composed field nothing but its value f = sum_i w_i k_i may be used, and its stages k_i may see nothing but
    its one argument and each other. The largest w_i is 1: what else multiplies f is a number of the tableau.

    Example:
        >>> import numpy as np
        >>> A = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])  # Heun: f = a + m(x + a)
        >>> layers = Blocks(A, np.ones((4, 1)), np.full((1, 4), 0.5), np.ones((1, 1)), (0, 1, 0, 1), (None,) * 4)
        >>> composed = with_composite_fields(layers)
        >>> composed.A.tolist(), composed.B.tolist()
        ([[0.0, 0.0], [1.0, 0.0]], [[0.5, 0.5]])
    """
    size, width = len(found.A), found.n_fields
    if width < 2 or size % width:
        return None
    pattern, count = found.fields[:width], size // width
    if len(set(pattern)) != width or found.fields != pattern * count:
        return None
    groups = [slice(i * width, (i + 1) * width) for i in range(count)]
    weights = _weights(found, groups)
    if weights is None:
        return None
    A, B = np.zeros((count, count)), np.zeros((len(found.V), count))
    largest = int(np.abs(weights).argmax())
    for i, rows in enumerate(groups):
        if not _same_rows(found.U[rows]) or not _alike(found.A[rows, rows], found.A[groups[0], groups[0]]):
            return None
        for j, columns in enumerate(groups):
            if i != j:
                if not _same_rows(found.A[rows, columns]):
                    return None
                A[i, j] = found.A[rows, columns][0, largest]
        B[:, i] = found.B[:, rows][:, largest]
    firsts = [i * width for i in range(count)]
    return Blocks(A, found.U[firsts], B, found.V, (0,) * count, tuple(found.rows[i] for i in firsts),
                  (None,) * count)  # fmt: skip


def as_one_field(found: Blocks) -> Blocks | None:
    """The tableau of x' = x + F(x), where stages are evaluated at x or at each other alone; None for others.

    A branch of which its part along the state is taken away, f - (f.x / x.x) x, is one field of several parts. What
    makes a method of stages is that some are evaluated at a state that others have moved.
    """
    moved = (found.U != 0).any(axis=1) & (found.A != 0).any(axis=1)
    if found.V.shape != (1, 1) or found.V[0, 0] != 1.0 or len(found.rows) < 2 or moved.any() or not found.A.any():
        return None
    one, sizes = np.ones((1, 1)), np.abs(found.B[found.B != 0])  # of f - g, both times h, the step size is h
    h = sizes[0] if len(sizes) and np.allclose(sizes, sizes[0], rtol=_CLOSE) else 1.0
    return Blocks(0 * one, one, h * one, found.V, (0,), found.rows[:1], (None,))


def _weights(found: Blocks, groups: list[slice]) -> Matrix | None:
    """The w of the composed field: every use of a group outside of it is a multiple of it."""
    uses = [found.B[:, columns] for columns in groups]
    uses += [found.A[rows, columns] for rows in groups for columns in groups if rows != columns]
    rows = np.concatenate(uses)
    largest = rows[np.abs(rows).max(axis=1).argmax()]
    if not largest.any():
        return None
    weights = largest / largest[np.abs(largest).argmax()]
    multiples = rows[:, [int(np.abs(largest).argmax())]] * weights
    return weights if _alike(rows, multiples) else None


def _same_rows(block: Matrix) -> bool:
    return _alike(block, np.broadcast_to(block[0], block.shape))


def _alike(a: Matrix, b: Matrix) -> bool:
    return bool(np.allclose(a, b, atol=_CLOSE * max(1.0, float(np.abs(b).max(initial=0.0)))))
