"""The exact sparse Jacobian, from as many products as rows can be told apart with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stabkit.operators.compression import RowGroups, compressed, count_entries, row_groups, slabs
from stabkit.operators.dense import SMALLEST, WORTHWHILE, cheaper_by_rows, with_entries
from stabkit.operators.linear_map import LinearMap
from stabkit.operators.memory import budget, keep_workspace, zeros
from stabkit.operators.products_at_once import products_at_once
from stabkit.operators.sparsity import Pattern, find_pattern, full_pattern
from stabkit.operators.verification import disagreement

if TYPE_CHECKING:
    import scipy.sparse

_INDEX_BYTES = 4


def sparse(J: LinearMap, memory: int | None) -> tuple[list[scipy.sparse.csr_array], str]:
    """One matrix per sample, and how they were obtained; see `Jacobian.sparse`."""
    if J.matrix is not None:
        return [_nonzero(matrix) for matrix in J.matrix], J.path
    if cheaper_by_rows(J):
        found, how = _by_rows(J, memory)
        return found, with_entries(J, how)
    found, how = _by_rows(J.T, memory)
    return [matrix.T.tocsr() for matrix in found], with_entries(J, how.replace(" rows", " columns"))


def _by_rows(J: LinearMap, memory: int | None) -> tuple[list[scipy.sparse.csr_array], str]:
    pattern = find_pattern(J)
    if pattern.n_groups > WORTHWHILE * J.shape[1]:
        found = _from_parts(J, pattern, memory)
        if found is not None:
            return found
    matrices = _assembled(J, pattern, memory)
    error = disagreement(J, lambda u: _transposed_product(matrices, u))
    if error <= 1:
        return matrices, compressed(pattern)
    doubts = f" ({compressed(pattern)}: off by {error:.1g} times what rounding explains)"
    return _assembled(J, full_pattern(J), memory), f"{J.shape[1]} products{doubts}"


def _from_parts(J: LinearMap, pattern: Pattern, memory: int | None) -> tuple[list[scipy.sparse.csr_array], str] | None:
    """The nonzero entries of the dense matrices, where many rows share columns and there is a cheap way to these.

    Attention is such a step: no two rows can be pulled back together, but most of the way keeps its tokens apart.
    """
    batch, m, n = J.shape
    whole = batch * m * n * J.dtype.itemsize
    result = whole + batch * count_entries(pattern) * (J.dtype.itemsize + _INDEX_BYTES)
    room = budget(memory, J.device)
    if J.origin is None or min(m, n) < SMALLEST or (room is not None and 2 * result > room):
        return None
    out = zeros(J.shape, J.dtype, J.device)
    for way in J.origin.ways(J, products_at_once(J, None, memory, result)):
        how = way(out)
        if disagreement(J, lambda u: (u.unsqueeze(1).to(out.dtype) @ out).squeeze(1)) <= 1:
            return [_nonzero(matrix) for matrix in out], how
        out.zero_()
    return None


def _assembled(J: LinearMap, pattern: Pattern, memory: int | None) -> list[scipy.sparse.csr_array]:
    import scipy.sparse

    batch, m, n = J.shape
    dtype = _storable(torch.empty(0, dtype=J.dtype)).dtype
    result = batch * count_entries(pattern) * (dtype.itemsize + _INDEX_BYTES)
    width = products_at_once(J, None, memory, result)
    keep_workspace()
    like = torch.empty(batch, n, dtype=J.dtype, device=J.device)
    by_tensor: list[list[scipy.sparse.csr_array]] = []
    for groups in row_groups(pattern):
        values = [
            zeros((len(groups.free_rows), len(groups.entry_sites)), dtype, torch.device("cpu")) for _ in range(batch)
        ]
        for slab in slabs(J.rmatmat, m, like, groups, width):
            for sample, stored in enumerate(values):
                into = stored[slab.start : slab.stop]
                if (into.dtype, into.device) == (like.dtype, like.device):
                    slab.entries(sample, out=into)
                else:
                    into.copy_(slab.entries(sample))
        indices, starts = _row_indices(groups, n)
        by_tensor.append([_matrix(groups, sample, indices, starts, n) for sample in values])
    if len(by_tensor) == 1:
        return by_tensor[0]
    return [scipy.sparse.vstack(blocks, format="csr") for blocks in zip(*by_tensor, strict=True)]


def _row_indices(groups: RowGroups, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of all rows, free index by free index, and where each row begins."""
    sites, free = len(groups.site_rows), len(groups.free_rows)
    one = len(groups.entry_columns)
    kind = np.int32 if max(one * free, n) < 2**31 else np.int64
    indices = zeros((free, one), torch.int32 if kind is np.int32 else torch.int64, torch.device("cpu")).numpy()
    np.copyto(indices, groups.entry_columns.astype(kind))
    lengths = np.bincount(groups.entry_sites, minlength=sites)
    starts = np.concatenate([[0], np.cumsum(np.tile(lengths, free))]).astype(kind)
    return indices.reshape(-1), starts


def _matrix(
    groups: RowGroups, values: Tensor, indices: np.ndarray, starts: np.ndarray, n: int
) -> scipy.sparse.csr_array:
    import scipy.sparse

    matrix = scipy.sparse.csr_array((values.numpy().reshape(-1), indices, starts), shape=(len(starts) - 1, n))
    if groups.in_order:
        return matrix
    return matrix[np.argsort(groups.rows)]


def _nonzero(matrix: Tensor) -> scipy.sparse.csr_array:
    """The nonzero entries of a dense matrix, row by row: scipy's own way takes twice as long as many a matrix did."""
    import scipy.sparse

    dense = _storable(matrix).cpu().numpy()
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(dense, axis=1))])
    count = int(starts[-1])
    kind = np.int32 if max(count, dense.shape[1]) < 2**31 else np.int64
    values, indices = np.empty(count, dense.dtype), np.empty(count, kind)
    for row, start, stop in zip(dense, starts, starts[1:], strict=False):
        columns = np.flatnonzero(row)
        values[start:stop], indices[start:stop] = row[columns], columns
    return scipy.sparse.csr_array((values, indices, starts.astype(kind)), shape=dense.shape)


def _transposed_product(matrices: list[scipy.sparse.csr_array], u: Tensor) -> Tensor:
    rows = _storable(u).cpu().numpy()
    return torch.from_numpy(np.stack([matrix.T @ row for matrix, row in zip(matrices, rows, strict=True)]))


def _storable(tensor: Tensor) -> Tensor:
    """In a dtype that scipy knows."""
    return tensor.detach() if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()
