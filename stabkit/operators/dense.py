"""The dense Jacobian, by the cheapest way that is proven to give it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stabkit.errors import ArgumentError
from stabkit.operators.compression import compressed, row_groups, slabs
from stabkit.operators.linear_map import LinearMap, Product, Way
from stabkit.operators.memory import keep_workspace, zeros
from stabkit.operators.products_at_once import products_at_once
from stabkit.operators.sparsity import Pattern, find_pattern
from stabkit.operators.verification import disagreement

SMALLEST = 192  # rows; below, looking for structure takes about as long as they do
WORTHWHILE = 0.8  # of the work without structure
_PUSH = 1.5  # what J V costs, in J^T U


def dense(J: LinearMap, chunk: int | None, memory: int | None, structure: bool) -> tuple[Tensor, str]:
    """The matrices ``(batch, m, n)``, and how they were obtained; see `Jacobian.dense`."""
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"chunk={chunk}; expected at least one product at once")
    width = products_at_once(J, chunk, memory, _result_bytes(J))
    if J.matrix is not None:
        return J.matrix.clone(), J.path
    out = zeros(J.shape, J.dtype, J.device)
    keep_workspace()
    by_rows = cheaper_by_rows(J)
    pulled, target = (J, out) if by_rows else (J.T, out.transpose(1, 2))
    doubts = ""
    if structure and min(J.shape[1:]) >= SMALLEST:
        for way in _ways(pulled, width):
            name = way(target)
            error = disagreement(pulled, lambda u: (u.unsqueeze(1).to(target.dtype) @ target).squeeze(1))
            if error <= 1:
                return out, with_entries(J, name)
            doubts += f" ({name}: off by {error:.1g} times what rounding explains)"
            out.zero_()
    return out, with_entries(J, fill_rows(pulled, pulled.rmatmat, target, width) + doubts)


def with_entries(J: LinearMap, how: str) -> str:
    """The path of the products, and how the entries were found from them."""
    return f"{J.path}; {how}"


def _result_bytes(J: LinearMap) -> int:
    batch, m, n = J.shape
    return batch * m * n * J.dtype.itemsize


def cheaper_by_rows(J: LinearMap) -> bool:
    """Whether pulling back the rows takes no longer than pushing forward the columns."""
    return J.shape[1] * _cost(J, pull=True) <= J.shape[2] * _cost(J, pull=False)


def _cost(J: LinearMap, *, pull: bool) -> float:
    """What a product costs: that with the transpose, or the other, which a recording makes in a second pass."""
    return _PUSH if J.origin is not None and pull == J.origin.transposed else 1.0


def _ways(J: LinearMap, width: int) -> Iterator[Way]:
    """Ways that promise to be cheaper than row by row, the most promising first."""
    pattern = find_pattern(J)
    if pattern.restricted and pattern.n_groups <= WORTHWHILE * J.shape[1]:
        yield lambda out: _fill_groups(J, pattern, out, width)
    if J.origin is not None:
        yield from J.origin.ways(J, width)


def fill_rows(J: LinearMap, pull: Product, out: Tensor, width: int) -> str:
    """Write all rows of J, one product each, and say how many it took."""
    batch, m, _ = J.shape
    for start in range(0, m, width):
        stop = min(start + width, m)
        unit = torch.zeros(stop - start, batch, m, dtype=J.dtype, device=J.device)
        unit[torch.arange(stop - start), :, torch.arange(start, stop)] = 1
        out[:, start:stop] = pull(unit.permute(1, 2, 0)).transpose(1, 2)
    return f"{m} products {'J V' if _transposed(J) else 'J^T U'}"


def _transposed(J: LinearMap) -> bool:
    return J.origin is not None and J.origin.transposed


def _fill_groups(J: LinearMap, pattern: Pattern, out: Tensor, width: int) -> str:
    like = torch.empty(J.shape[0], J.shape[2], dtype=J.dtype, device=J.device)
    row_step, column_step = out.stride()[1:]
    for groups in row_groups(pattern):
        places = groups.site_rows[groups.entry_sites] * row_step + groups.entry_columns * column_step
        at = torch.from_numpy(places).to(J.device)
        for slab in slabs(J.rmatmat, J.shape[1], like, groups, width):
            for sample, matrix in enumerate(out):
                rows = groups.free_rows[slab.start : slab.stop]
                for row, entries in zip(rows, slab.entries(sample), strict=True):
                    first = matrix.storage_offset() + int(row) * row_step
                    tail = matrix.as_strided((J.shape[1] * J.shape[2] - int(row) * row_step,), (1,), first)
                    tail.scatter_(0, at, entries)
    return compressed(pattern)
