"""The dense Jacobian from the parts of a `SitePlan`: blocks of local parts multiplied around a middle of all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stabkit.errors import ArgumentError
from stabkit.tracing.graph.values import Value, meta_of
from stabkit.tracing.products.site_plan import Part, SitePlan
from stabkit.tracing.products.step_products import Space
from stabkit.tracing.products.unit_cotangents import UnitPuller

_ROWS = 256  # rows of one site that are multiplied with the blocks behind them at once


def fill_by_sites(plan: SitePlan, source: Space, out: Tensor, width: int) -> str:
    """Write the Jacobian of a plan's segment into ``out``, ``(batch, m, n)``.

    Where the mixing is causal, the middle leaves most sites untouched; this is found with one random cotangent for
    every site, and what is zero is not multiplied on.

    Args:
        plan: the parts.
        source: flat coordinates of the columns.
        out: zeros to write into.
        width: how many products are made at once.

    Returns:
        In words, how it was done.
    """
    writer = _Writer(plan, source, out)
    left = _left_rows(plan, width)
    reached = _reached(plan, left, width)
    blocks = _right_blocks(plan, width) if plan.right is not None else {}
    for place in range(plan.sites.per_sample):
        for rows in torch.split(torch.arange(plan.rows.shape[1]), _ROWS):
            for part in plan.carried:
                writer.add_own(place, rows, part, left[part.value])
            if plan.right is None:
                for some in torch.split(rows, width):
                    writer.add_rows(place, some, _through_middle(plan, left, place, some))
                continue
            _add_products(plan, writer, left, reached, blocks, place, rows, width)
    ends = "before" if plan.right is None else "before and after"
    return f"one block for each of {plan.sites.per_sample} sites {ends} a middle of {plan.rows.numel()} products"


def _left_rows(plan: SitePlan, width: int) -> dict[Value, Tensor]:
    """Every row of every site's block of the local part: ``(rows of one site, entries)`` for the values at the cut."""
    puller = UnitPuller(plan.left)
    (meta,) = plan.left.target_metas
    values = [part.value for part in (*plan.carried, *plan.cut)]
    found: dict[Value, list[Tensor]] = {value: [] for value in values}
    for entries in torch.split(plan.targets.T.to(meta.device), width):  # (rows, sites)
        seeds = torch.zeros(len(entries), meta.numel, dtype=meta.dtype, device=meta.device)
        seeds.scatter_(1, entries, 1)
        for value, pulled in zip(plan.left.source, puller([seeds.view(-1, *meta.shape)]), strict=True):
            found[value].append(pulled.flatten(1))
    return {value: torch.cat(pieces) for value, pieces in found.items()}


def _right_blocks(plan: SitePlan, width: int) -> dict[Value, Tensor]:
    """For every value behind the middle the block of every site: ``(sites, its entries, columns)``."""
    if plan.right is None or plan.columns is None:
        return {}
    puller = UnitPuller(plan.right)
    metas = plan.right.target_metas
    blocks = {}
    for place, value in enumerate(plan.right.target):
        part = next(part for part in plan.behind if part.value == value)
        device = metas[place].device
        columns = plan.columns.to(device)
        pieces = []
        for entries in torch.split(part.entries.T.to(device), width):
            seeds = [torch.zeros(len(entries), m.numel, dtype=m.dtype, device=m.device) for m in metas]
            seeds[place].scatter_(1, entries, 1)
            pulled = puller([seed.view(-1, *m.shape) for seed, m in zip(seeds, metas, strict=True)])
            flat = torch.cat([tensor.flatten(1) for tensor in pulled], dim=1)
            pieces.append(flat[:, columns].movedim(1, 0))
        blocks[value] = torch.cat(pieces, dim=1).contiguous()
    return blocks


def _through_middle(plan: SitePlan, left: dict[Value, Tensor], place: int, rows: Tensor) -> list[Tensor]:
    """Some rows of one place, of all samples, pulled back to the values behind the middle."""
    seeds = []
    for part in plan.cut:
        meta, whole = meta_of(part.value), left[part.value]
        own = part.entries[place :: plan.sites.per_sample].flatten().to(meta.device)
        seed = torch.zeros(len(rows), meta.numel, dtype=meta.dtype, device=meta.device)
        seed[:, own] = whole[int(rows[0]) : int(rows[-1]) + 1][:, own]
        seeds.append(seed.view(-1, *meta.shape))
    return plan.middle.vjp_batch(seeds)


def _reached(plan: SitePlan, left: dict[Value, Tensor], width: int) -> dict[Value, Tensor]:
    """Which sites the rows of every place reach behind the middle: ``(places, sites)`` for every value there."""
    generator = torch.Generator().manual_seed(0)
    places = plan.sites.per_sample
    tables: dict[Value, list[Tensor]] = {part.value: [] for part in plan.behind}
    for some in torch.split(torch.arange(places), width):
        seeds = []
        for part in plan.cut:
            meta, whole = meta_of(part.value), left[part.value]
            weights = torch.randn(len(some), len(whole), generator=generator).to(whole)
            mixed = weights @ whole
            seed = torch.zeros_like(mixed)
            own = part.entries.view(-1, places, part.entries.shape[1])[:, some].movedim(1, 0).flatten(1).to(meta.device)
            seed.scatter_(1, own, mixed.gather(1, own))
            seeds.append(seed.view(-1, *meta.shape))
        pulled = dict(zip(plan.middle.source, plan.middle.vjp_batch(seeds), strict=True))
        for part in plan.behind:
            touched = pulled[part.value].flatten(1)[:, part.entries.to(pulled[part.value].device)] != 0
            tables[part.value].append(touched.any(2).cpu())
    return {value: torch.cat(pieces) for value, pieces in tables.items()}


def _add_products(
    plan: SitePlan,
    writer: _Writer,
    left: dict[Value, Tensor],
    reached: dict[Value, Tensor],
    blocks: dict[Value, Tensor],
    place: int,
    rows: Tensor,
    width: int,
) -> None:
    """Pull some rows of one place through the middle and multiply them with the blocks of the sites they reach."""
    behind = [(part, reached[part.value][place].nonzero().flatten()) for part in plan.behind]
    behind = [(part, sites) for part, sites in behind if len(sites)]
    gathered = []
    for part, sites in behind:
        meta = meta_of(part.value)
        gathered.append(torch.empty(len(rows), len(sites), part.entries.shape[1], dtype=meta.dtype, device=meta.device))
    done = 0
    for some in torch.split(rows, width):
        pulled = dict(zip(plan.middle.source, _through_middle(plan, left, place, some), strict=True))
        for (part, sites), whole in zip(behind, gathered, strict=True):
            index = part.entries[sites].flatten().to(whole.device)
            torch.index_select(pulled[part.value].flatten(1), 1, index, out=whole[done : done + len(some)].flatten(1))
        done += len(some)
    for (part, sites), whole in zip(behind, gathered, strict=True):
        for number, site in enumerate(sites.tolist()):
            if part.value in blocks:
                writer.add_product(place, rows, site, whole[:, number], blocks[part.value][site])
            else:
                writer.add_entries(place, rows, site, part, whole[:, number])


class _Writer:
    """Adds blocks of one place's rows and one site's columns to the result."""

    def __init__(self, plan: SitePlan, source: Space, out: Tensor) -> None:
        self.plan = plan
        self.source = source
        self.out = out
        tables, start = [], 0
        self._starts: dict[Value, int] = {}
        for value, meta, layout in zip(plan.source, source.metas, source.layouts, strict=True):
            self._starts[value] = start
            tables.append(layout.columns(torch.arange(start, start + meta.numel).view(meta.shape), meta.shape))
            start += meta.numel
        entries = torch.cat(tables, dim=1)  # (batch, n)
        self._column_of = torch.empty(start, dtype=torch.int64)
        self._column_of[entries] = torch.arange(entries.shape[1]).expand_as(entries)

    def add_own(self, place: int, rows: Tensor, part: Part, whole: Tensor) -> None:
        """What reaches the same place of the source along a value that is only carried."""
        for site in range(place, self.plan.sites.count, self.plan.sites.per_sample):
            block = whole[int(rows[0]) : int(rows[-1]) + 1][:, part.entries[site].to(whole.device)]
            self.add_entries(place, rows, site, part, block)

    def add_entries(self, place: int, rows: Tensor, site: int, part: Part, block: Tensor) -> None:
        """A block whose columns are the entries of a source value at one site."""
        columns = self._column_of[self._starts[part.value] + part.entries[site]]
        view, write_back = self._view(place, rows, site, columns)
        view += block
        write_back(view)

    def add_product(self, place: int, rows: Tensor, site: int, left: Tensor, right: Tensor) -> None:
        """The product of two matrices, whose columns are all those of one site."""
        if self.plan.columns is None:
            raise ArgumentError("this plan has no local part after the source")
        view, write_back = self._view(place, rows, site, self._column_of[self.plan.columns[site]])
        view.addmm_(left.to(view.dtype), right.to(view.dtype))
        write_back(view)

    def add_rows(self, place: int, rows: Tensor, pulled: list[Tensor]) -> None:
        """Whole rows, given as tensors of the source."""
        at = self.plan.rows[place][rows].to(self.out.device)
        self.out[:, at] += self.source.flatten(pulled).transpose(1, 2).to(self.out.dtype)

    def _view(self, place: int, rows: Tensor, site: int, columns: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
        """A block of the result to add to, and what brings it back if it is a copy."""
        sample = self.out[site // self.plan.sites.per_sample]
        at = self.plan.rows[place][rows]
        if _consecutive(at) and _consecutive(columns):
            return sample[int(at[0]) : int(at[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1], lambda _: None
        index = at.to(sample.device)[:, None], columns.to(sample.device)[None]
        return sample[index], lambda block: sample.__setitem__(index, block)


def _consecutive(index: Tensor) -> bool:
    return bool((index.diff() == 1).all())
