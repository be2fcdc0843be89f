"""Contours f = 0 in the complex plane: marching squares, with every vertex refined on its grid edge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from stabkit.integrators.spectral_radius import ComplexArray, FloatArray

_BISECTIONS = 48


def level_set(
    f: Callable[[ComplexArray], FloatArray], box: tuple[float, float, float, float], resolution: int
) -> list[tuple[ComplexArray, bool]]:
    """The curves on which f changes sign inside a box.

    Args:
        f: vectorised, real; negative inside.
        box: (left, right, bottom, top).
        resolution: grid cells along each side.

    Returns:
        Pairs (points in order, closed); the negative side lies to the left of the direction of travel.

    Example:
        >>> (circle, closed), = level_set(lambda z: np.abs(z) - 1, (-2, 2, -2, 2), 50)
        >>> closed, bool(np.allclose(np.abs(circle), 1))
        (True, True)
    """
    left, right, bottom, top = box
    x, y = np.linspace(left, right, resolution + 1), np.linspace(bottom, top, resolution + 1)
    grid = x[None, :] + 1j * y[:, None]
    inside = f(np.asarray(grid.reshape(-1), dtype=complex)).reshape(grid.shape) < 0
    crossings = _crossings(f, grid, inside)
    return [(np.array([crossings[e] for e in chain]), closed) for chain, closed in _chains(inside)]


# An edge is (row, column, 0) from grid[row, column] to the right, or (row, column, 1) upwards.
_Edge = tuple[int, int, int]


def _crossings(
    f: Callable[[ComplexArray], FloatArray], grid: ComplexArray, inside: npt.NDArray[np.bool_]
) -> dict[_Edge, complex]:
    out: dict[_Edge, complex] = {}
    for direction, (a, b) in enumerate((((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
                                        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))))):  # fmt: skip
        index = np.argwhere(inside[a] != inside[b])
        first, second = grid[a][tuple(index.T)], grid[b][tuple(index.T)]
        starts_inside = inside[a][tuple(index.T)]
        low, high = np.where(starts_inside, first, second), np.where(starts_inside, second, first)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            negative = f(np.asarray(middle, dtype=complex)) < 0
            low, high = np.where(negative, middle, low), np.where(negative, high, middle)
        out.update(((int(i), int(j), direction), complex(z)) for (i, j), z in zip(index, (low + high) / 2, strict=True))
    return out


def _segments(inside: npt.NDArray[np.bool_]) -> dict[_Edge, _Edge]:
    """From each crossed edge to the next one, with the inside on the left."""
    following: dict[_Edge, _Edge] = {}
    corners = inside.astype(int)
    code = corners[:-1, :-1] + 2 * corners[:-1, 1:] + 4 * corners[1:, 1:] + 8 * corners[1:, :-1]
    for i, j in np.argwhere((code > 0) & (code < 15)):
        row, column = int(i), int(j)
        sides = [(row, column, 0), (row, column + 1, 1), (row + 1, column, 0), (row, column, 1)]
        states = [bool(code[i, j] >> k & 1) for k in range(4)]  # counter-clockwise from the lower left
        # Walking the cell counter-clockwise, a side that leads from outside to inside is where the curve enters.
        enters = [sides[k] for k in range(4) if states[k] and not states[(k + 1) % 4]]
        leaves = [sides[k] for k in range(4) if not states[k] and states[(k + 1) % 4]]
        if len(enters) == 2:  # a saddle: keep the two inside corners apart
            leaves = [sides[(sides.index(side) - 1) % 4] for side in enters]
        following.update(zip(enters, leaves, strict=True))
    return following


def _chains(inside: npt.NDArray[np.bool_]) -> list[tuple[list[_Edge], bool]]:
    following = _segments(inside)
    incoming: dict[_Edge, int] = defaultdict(int)
    for edge in following.values():
        incoming[edge] += 1
    starts = [edge for edge in following if not incoming[edge]]
    out = []
    for group, closed in ((starts, False), (list(following), True)):
        for start in group:
            if start not in following:
                continue
            chain = [start]
            while chain[-1] in following:
                chain.append(following.pop(chain[-1]))
            out.append((chain[:-1] if closed else chain, closed))
    return out
