"""Rows of a Jacobian pulled back together, several at once, and told apart again by its sparsity pattern."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from stabkit.operators.linear_map import Product
from stabkit.operators.sparsity import Pattern


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The rows that run through one tensor, divided into groups that share no column.

    The axes along which the pattern says something span the *sites*; the others are *free*. What a site reaches, and
    its color, are the same for every free index, so that row ``free + site`` is in group ``(free, color of site)``.

    Attributes:
        free_rows: row of every free index, at the first site.
        site_rows: row of every site, at the first free index.
        colors: the color of every site.
        n_colors: how many there are.
        entry_sites: the site of every entry of one free index, in the order of sites and then columns.
        entry_columns: its column.
    """

    free_rows: np.ndarray
    site_rows: np.ndarray
    colors: np.ndarray
    n_colors: int
    entry_sites: np.ndarray
    entry_columns: np.ndarray

    @property
    def in_order(self) -> bool:
        """Whether rows come free index by free index, site by site."""
        return bool((np.diff(self.rows) > 0).all())

    @property
    def rows(self) -> np.ndarray:
        """All rows, free index by free index, site by site."""
        rows: np.ndarray = (self.free_rows[:, None] + self.site_rows).reshape(-1)
        return rows


def row_groups(pattern: Pattern) -> tuple[RowGroups, ...]:
    """The groups of the rows of every tensor."""
    starts = np.cumsum([0, *(math.prod(shape) for shape in pattern.row_shapes)])
    return tuple(_tensor_groups(pattern, tensor, int(starts[tensor])) for tensor in range(len(pattern.row_shapes)))


def compressed(pattern: Pattern) -> str:
    """In words, how many products the rows take."""
    rows = sum(math.prod(shape) for shape in pattern.row_shapes)
    return f"{pattern.n_groups} products for {rows} rows, by {pattern.n_products} probes of what they share"


def count_entries(pattern: Pattern) -> int:
    """How many entries the pattern holds."""
    total = 0
    for tensor, (shape, reaches) in enumerate(zip(pattern.row_shapes, pattern.reaches, strict=True)):
        free = math.prod(size for size, reach in zip(shape, reaches, strict=True) if reach is None)
        total += free * int(_site_counts(_site_tables(pattern, tensor)).sum())
    return total


def _tensor_groups(pattern: Pattern, tensor: int, start: int) -> RowGroups:
    shape, reaches = pattern.row_shapes[tensor], pattern.reaches[tensor]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    sites = [axis for axis, reach in enumerate(reaches) if reach is not None]
    free = [axis for axis, reach in enumerate(reaches) if reach is None]
    colors, n_colors = np.zeros(1, dtype=np.int64), 1
    for of_axis in pattern.colors[tensor]:
        if of_axis is not None:
            count = int(of_axis.max()) + 1
            colors = (colors[:, None] * count + of_axis).reshape(-1)
            n_colors *= count
    entry_sites, entry_columns = _entries(pattern, _site_tables(pattern, tensor))
    return RowGroups(
        start + _offsets(shape, strides, free),
        _offsets(shape, strides, sites),
        colors,
        n_colors,
        entry_sites,
        entry_columns,
    )


def _offsets(shape: tuple[int, ...], strides: list[int], axes: list[int]) -> np.ndarray:
    parts = [np.arange(shape[axis]) * strides[axis] for axis in axes]
    return reduce(lambda total, part: (total[:, None] + part).reshape(-1), parts, np.zeros(1, dtype=np.int64))


def _site_tables(pattern: Pattern, tensor: int) -> list[list[np.ndarray]]:
    """For every column tensor and axis which of its indices every site reaches, ``(sites, size of the axis)``."""
    known = [reach for reach in pattern.reaches[tensor] if reach is not None]
    sizes = [len(reach[0][0]) for reach in known]
    sites = np.indices(sizes).reshape(len(sizes), math.prod(sizes))
    tables = []
    for i, shape in enumerate(pattern.column_shapes):
        of_tensor = []
        for b in range(max(len(shape), 1)):
            table = np.ones((sites.shape[1], shape[b] if shape else 1), dtype=bool)
            for reach, indices in zip(known, sites, strict=True):
                table &= reach[i][b][indices]
            of_tensor.append(table)
        tables.append(of_tensor)
    return tables


def _site_counts(tables: list[list[np.ndarray]]) -> np.ndarray:
    """Columns that every site reaches."""
    of_tensors = [np.prod([table.sum(1) for table in of_tensor], axis=0) for of_tensor in tables]
    counts: np.ndarray = np.sum(of_tensors, axis=0)
    return counts


def _entries(pattern: Pattern, tables: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Site and column of every entry of one free index, in this order."""
    sites, columns, start = [], [], 0
    for shape, of_tensor in zip(pattern.column_shapes, tables, strict=True):
        within = np.zeros((len(of_tensor[0]), 1), dtype=np.int64)
        valid = np.ones_like(within, dtype=bool)
        for table in of_tensor:
            indices, present = _listed(table)
            within = (within[:, :, None] * table.shape[1] + indices[:, None, :]).reshape(len(table), -1)
            valid = (valid[:, :, None] & present[:, None, :]).reshape(len(table), -1)
        sites.append(np.nonzero(valid)[0])
        columns.append(within[valid] + start)
        start += math.prod(shape)
    if len(sites) == 1:
        return sites[0], columns[0]
    order = np.argsort(np.concatenate(sites), kind="stable")
    return np.concatenate(sites)[order], np.concatenate(columns)[order]


def _listed(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The true indices of every row side by side, ``(rows, most)``, and which of these places are taken."""
    counts = table.sum(1)
    rows, places = np.nonzero(table)
    position = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    listed = np.zeros((len(table), max(int(counts.max(initial=0)), 1)), dtype=np.int64)
    listed[rows, position] = places
    return listed, np.arange(listed.shape[1]) < counts[:, None]


@dataclass(frozen=True, eq=False)
class Slab:
    """The products that hold the rows of some free indices.

    Attributes:
        start: first free index.
        stop: last free index, exclusive.
        products: ``(batch, free indices, colors * n)``.
        places: where in them every entry of a free index stands.
    """

    start: int
    stop: int
    products: Tensor
    places: Tensor

    def entries(self, sample: int, out: Tensor | None = None) -> Tensor:
        """The entries of the rows, ``(free indices, entries of one)``."""
        places = self.places.expand(self.stop - self.start, -1)
        return torch.gather(self.products[sample], 1, places, out=out)


def slabs(pull: Product, m: int, like: Tensor, groups: RowGroups, chunk: int) -> Iterator[Slab]:
    """The rows of one tensor, from one product for every group.

    Args:
        pull: ``(batch, m, k) -> (batch, n, k)``, the products J^T U.
        m: how many rows there are in all.
        like: an empty tensor ``(batch, n)`` of the dtype and device of the products.
        groups: the rows.
        chunk: how many products are made at once.
    """
    batch, n = like.shape
    width = groups.n_colors
    at_once = max(chunk // width, 1)
    places = torch.from_numpy(groups.colors[groups.entry_sites] * n + groups.entry_columns).to(like.device)
    for start in range(0, len(groups.free_rows), at_once):
        free = groups.free_rows[start : start + at_once]
        rows = like.new_empty(batch, len(free) * width, n) if len(free) * width > chunk else None
        for first in range(0, len(free) * width, chunk):
            seeds = _seeds(groups, free, first, min(first + chunk, len(free) * width), batch, m, like)
            pulled = pull(seeds).transpose(1, 2)
            if rows is None:
                rows = pulled
            else:
                rows[:, first : first + chunk] = pulled
        if rows is not None:
            yield Slab(start, start + len(free), rows.reshape(batch, len(free), width * n), places)


def _seeds(groups: RowGroups, free: np.ndarray, first: int, last: int, batch: int, m: int, like: Tensor) -> Tensor:
    """Ones on the rows of the groups ``first`` to ``last`` of some free indices, ``(batch, m, groups)``."""
    index = (np.arange(len(free))[:, None] * groups.n_colors + groups.colors).reshape(-1)
    rows = (free[:, None] + groups.site_rows).reshape(-1)
    wanted = (index >= first) & (index < last)
    seeds = like.new_zeros(last - first, batch, m)
    at = torch.from_numpy(index[wanted] - first).to(like.device), torch.from_numpy(rows[wanted]).to(like.device)
    seeds[at[0], :, at[1]] = 1
    return seeds.permute(1, 2, 0)
