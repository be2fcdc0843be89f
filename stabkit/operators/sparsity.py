"""Where the entries of a Jacobian can be nonzero, found by pulling back random cotangents along every axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stabkit.operators.linear_map import LinearMap, Shapes

_SHORT = 16  # an axis of so few indices is probed index by index
_LONGEST = 16_384  # a longer axis is not looked at: its table of reaches would not fit
_PROBES = 32  # products at once
Reach = tuple[tuple[np.ndarray, ...], ...]
"""For every column tensor and axis a boolean table: which of its indices the indices of a row axis reach."""

_MOST_EDGES = 500_000  # above, the greedy coloring would take longer than it can save


@dataclass(frozen=True)
class Pattern:
    """A set of entries that holds all that are nonzero.

    Rows run through tensors, and so do columns. A row with the indices ``(i, j, ...)`` in its tensor can be nonzero
    in those columns which lie in the reach of ``i`` along the first axis, of ``j`` along the second, and so on; every
    reach is a product of sets, one for every axis of a column tensor.

    Attributes:
        row_shapes: shapes of the tensors that the rows run through.
        column_shapes: the same for the columns.
        reaches: for every row tensor and axis, None where the index says nothing, or for every column tensor and
            axis a boolean table ``(size of the row axis, size of the column axis)``.
        n_products: how many products it took to find.
    """

    row_shapes: Shapes
    column_shapes: Shapes
    reaches: tuple[tuple[Reach | None, ...], ...]
    n_products: int

    @property
    def restricted(self) -> bool:
        """Whether any entry is known to be zero."""
        return any(reach is not None for tensor in self.reaches for reach in tensor)

    @cached_property
    def colors(self) -> tuple[tuple[np.ndarray | None, ...], ...]:
        """For every row tensor and axis a color for every index, None where the index says nothing."""
        return tuple(
            tuple(None if reach is None else axis_colors(reach) for reach in tensor) for tensor in self.reaches
        )

    @property
    def n_groups(self) -> int:
        """So many products tell all rows apart: one for every combination of colors."""
        return sum(
            math.prod(size if c is None else int(c.max()) + 1 for size, c in zip(shape, colors, strict=True))
            for shape, colors in zip(self.row_shapes, self.colors, strict=True)
        )


def find_pattern(J: LinearMap) -> Pattern:
    """The pattern of a Jacobian, the union over its samples, from few products J^T U.

    The cotangent of a probe is random on all rows with one index along one axis, and zero elsewhere. What it reaches is
    the union of what these rows reach: sums of products with random numbers vanish by accident with probability zero.
    The middle of an axis and its ends are tried first; if they reach the same, the axis is let be. On long axes many
    indices that reach far-apart places are probed together.

    Example:
        >>> import torch
        >>> from stabkit.operators import from_dense
        >>> pattern = find_pattern(from_dense(torch.eye(5)))
        >>> pattern.reaches[0][0][0][0].astype(int).tolist()[1]
        [0, 1, 0, 0, 0]
    """
    prober = _Prober(J)
    reaches = []
    for tensor, shape in enumerate(J.row_shapes):
        size = math.prod(shape)
        reaches.append(tuple(_axis_reach(prober, tensor, axis, size) for axis in range(len(shape))))
    return Pattern(J.row_shapes, J.column_shapes, tuple(reaches), prober.count)


def full_pattern(J: LinearMap) -> Pattern:
    """The pattern of which nothing is known to be zero."""
    return Pattern(J.row_shapes, J.column_shapes, tuple((None,) * len(shape) for shape in J.row_shapes), 0)


class _Prober:
    """Probes of one operator, counted."""

    def __init__(self, J: LinearMap) -> None:
        self.J = J
        self.count = 0
        batch, m, _ = J.shape
        generator = torch.Generator().manual_seed(0)
        self._weights = torch.randn(batch, m, generator=generator).to(dtype=J.dtype, device=J.device)
        self._starts = np.cumsum([0, *(math.prod(shape) for shape in J.row_shapes)])

    def size(self, tensor: int, axis: int) -> int:
        return self.J.row_shapes[tensor][axis]

    def reach(self, tensor: int, axis: int, masks: np.ndarray) -> Reach:
        """What the rows reach whose index along an axis is in a set; one set for every row of ``masks``."""
        parts = [self._reach(tensor, axis, masks[i : i + _PROBES]) for i in range(0, len(masks), _PROBES)]
        return tuple(
            tuple(np.concatenate(tables) for tables in zip(*(part[i] for part in parts), strict=True))
            for i in range(len(self.J.column_shapes))
        )

    def _reach(self, tensor: int, axis: int, masks: np.ndarray) -> Reach:
        shape = self.J.row_shapes[tensor]
        start, stop = self._starts[tensor], self._starts[tensor + 1]
        chosen = torch.from_numpy(masks).to(self.J.device)
        chosen = chosen.view(len(masks), 1, *(-1 if i == axis else 1 for i in range(len(shape))))
        cotangents = self._weights.new_zeros(len(masks), *self._weights.shape)
        weights = self._weights[:, start:stop].view(-1, *(shape or (1,)))
        cotangents[:, :, start:stop] = (weights * chosen).flatten(2)
        pulled = self.J.rmatmat(cotangents.permute(1, 2, 0))
        self.count += len(masks)
        touched = (pulled != 0).any(0)  # (n, probes)
        sizes = [math.prod(s) for s in self.J.column_shapes]
        return tuple(
            _projections(part.T.reshape(len(masks), *(s or (1,))))
            for part, s in zip(torch.split(touched, sizes), self.J.column_shapes, strict=True)
        )


def _projections(touched: Tensor) -> tuple[np.ndarray, ...]:
    """For every axis of the columns which of its indices are touched: tables ``(probes, size)``."""
    axes = range(1, touched.dim())
    tables = []
    for axis in axes:
        others = [other for other in axes if other != axis]
        tables.append((touched.any(dim=others) if others else touched).cpu().numpy())
    return tuple(tables)


def _axis_reach(prober: _Prober, tensor: int, axis: int, tensor_size: int) -> Reach | None:
    size = prober.size(tensor, axis)
    if not 1 < size <= _LONGEST:
        return None
    middle = prober.reach(tensor, axis, _unit_masks([size // 2], size))
    if all(table.all() for tables in middle for table in tables):
        return None
    tried = np.unique([0, size // 2, size - 1])
    sampled = prober.reach(tensor, axis, _unit_masks(tried, size))
    if all((table == table[0]).all() for tables in sampled for table in tables):
        return None
    if size > _SHORT:
        found = _from_classes(prober, tensor, axis, tried, sampled)
        if found is not None:
            return found
        if size > max(64, tensor_size // 8):
            return None  # knowing it would cost as much as the rows themselves
    return prober.reach(tensor, axis, np.eye(size, dtype=bool))


def _unit_masks(indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    masks: np.ndarray = np.eye(size, dtype=bool)[np.asarray(indices)]
    return masks


def _from_classes(prober: _Prober, tensor: int, axis: int, tried: np.ndarray, sampled: Reach) -> Reach | None:
    """The reach of every index from probes of residue classes, if reaches are local; None if they are not.

    Index i of the row axis is expected to reach places near ``i n / size`` of some column axis of size n, at most as
    far off as the tried indices do, and a bit more. Indices in a class are so far apart that their windows do not
    overlap; so whoever is touched belongs to one of them. What is touched outside every window refutes the expectation,
    and so does what is touched by the classes of another spacing and not foreseen.
    """
    size = prober.size(tensor, axis)
    widths = [[_half_width(table, tried, size) for table in tables] for tables in sampled]
    columns = [[table.shape[1] for table in tables] for tables in sampled]
    spacings = [
        math.ceil((2 * w + 1) * size / n)
        for ws, ns in zip(widths, columns, strict=True)
        for w, n in zip(ws, ns, strict=True)
        if w is not None
    ]
    if not spacings or 3 * max(spacings) > size:
        return None
    found = _attributed(*_touched(prober, tensor, axis, max(spacings)), widths)
    classes, touched = _touched(prober, tensor, axis, max(spacings) + 1)
    for tables, reach in zip(touched, found, strict=True):
        for table, reached in zip(tables, reach, strict=True):
            if (table & ~_united(reached, classes, len(table))).any():
                return None
    return found


def _touched(prober: _Prober, tensor: int, axis: int, spacing: int) -> tuple[np.ndarray, Reach]:
    """The class of every index, and what each class touches."""
    classes = np.arange(prober.size(tensor, axis)) % spacing
    return classes, prober.reach(tensor, axis, classes == np.arange(spacing)[:, None])


def _attributed(classes: np.ndarray, touched: Reach, widths: list[list[float | None]]) -> Reach:
    """What every index reaches: what its class touches, within its own window where it has one."""
    reaches = []
    for tables, ws in zip(touched, widths, strict=True):
        of_tensor = []
        for table, width in zip(tables, ws, strict=True):
            reached: np.ndarray = table[classes]
            if width is not None:
                centres = _centres(len(classes), table.shape[1])
                reached &= np.abs(np.arange(table.shape[1]) - centres[:, None]) <= width
            of_tensor.append(reached)
        reaches.append(tuple(of_tensor))
    return tuple(reaches)


def _united(reached: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    united = np.zeros((count, reached.shape[1]), dtype=bool)
    np.logical_or.at(united, classes, reached)
    return united


def _centres(size: int, n: int) -> np.ndarray:
    centres: np.ndarray = (np.arange(size) + 0.5) * n / size - 0.5
    return centres


def _half_width(table: np.ndarray, tried: np.ndarray, size: int) -> float | None:
    """How far from its place an index may reach along a column axis; None if it is not local there."""
    n = table.shape[1]
    if n == 1 or not table.any():
        return None
    which, places = np.nonzero(table)
    farthest = float(np.abs(places - _centres(size, n)[tried[which]]).max())
    allowed = farthest + max(1.0, 0.25 * farthest, n / size)
    return allowed if 4 * allowed < n else None


def axis_colors(reach: Reach) -> np.ndarray:
    """A color for every index of an axis; indices of one color reach no common column.

    One product with the sum of the rows of a group gives all their entries (Curtis, Powell and Reid 1974); two rows
    that share a column are neighbours at distance two in the bipartite graph of rows and columns, so that this is a
    distance-two coloring (Gebremedhin, Manne and Pothen 2005).

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
