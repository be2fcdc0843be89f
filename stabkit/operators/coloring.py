"""Rows of a sparse Jacobian that share no column, in as few groups as can be found quickly.

One product with the sum of the rows of a group gives all their entries (Curtis, Powell and Reid 1974); two rows that
share a column are neighbours at distance two in the bipartite graph of rows and columns, so that this is a distance-two
coloring (Gebremedhin, Manne and Pothen 2005).
"""

from __future__ import annotations

import numpy as np

Reach = tuple[tuple[np.ndarray, ...], ...]
"""For every column tensor and axis a boolean table: which of its indices the indices of a row axis reach."""

_MOST_EDGES = 500_000  # above, the greedy coloring would take longer than it can save


def axis_colors(reach: Reach) -> np.ndarray:
    """A color for every index of an axis; indices of one color reach no common column.

    Equally spaced colors are taken where they need as few as any coloring, as on the axes of a convolution; otherwise
    the better of these and networkx's greedy coloring.

    Args:
        reach: what each index reaches, as in `Pattern`.

    Example:
        >>> import numpy as np
        >>> band = np.abs(np.subtract.outer(np.arange(7), np.arange(7))) <= 1
        >>> axis_colors(((band,),)).tolist()
        [0, 1, 2, 0, 1, 2, 0]
    """
    conflicts = _conflicts(reach)
    size = len(conflicts)
    first, second = np.nonzero(np.triu(conflicts, 1))
    if not len(first):
        return np.zeros(size, dtype=np.int64)
    periodic = np.arange(size) % _period(np.unique(second - first), size)
    enough = periodic.max() + 1 <= _most_on_one_column(reach)
    if enough or len(first) > _MOST_EDGES or len(first) == size * (size - 1) // 2:
        return periodic
    greedy = _greedy(size, first, second)
    return greedy if greedy.max() < periodic.max() else periodic


def _conflicts(reach: Reach) -> np.ndarray:
    """Which two indices reach a common column: in some tensor, a common index along every axis."""
    size = len(reach[0][0])
    conflicts = np.zeros((size, size), dtype=bool)
    for tables in reach:
        common = np.ones((size, size), dtype=bool)
        for table in tables:
            dense = table.astype(np.float32)
            common &= dense @ dense.T > 0
        conflicts |= common
    return conflicts


def _most_on_one_column(reach: Reach) -> int:
    """How many indices reach a column at most; where this is attained, that many colors are needed."""
    return max(min(int(table.sum(0).max()) for table in tables) for tables in reach)


def _period(distances: np.ndarray, size: int) -> int:
    """The smallest period none of whose multiples is a distance between indices in conflict."""
    return next((p for p in range(2, size) if not (distances % p == 0).any()), size)


def _greedy(size: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from(zip(first.tolist(), second.tolist(), strict=True))
    found = nx.greedy_color(graph, strategy="largest_first")
    return np.array([found[index] for index in range(size)], dtype=np.int64)
