"""Where a step begins and ends to mix sites (tokens, say): cuts between which only the middle needs every row.

An attention block normalises and projects token by token, mixes tokens, and goes on token by token. Of the local parts
at both ends the Jacobians are block diagonal: one backward pass gives a row of every token's block. Only the middle is
pulled back row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.tracing.graph.values import Value, meta_of, random_tensors
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.products.site_labels import Sites, axis_labels, entries_by_site, possible_labels, pulled_labels
from stabkit.tracing.products.step_products import Products, Space
from stabkit.tracing.products.unit_cotangents import Linear, linear_nodes

_FEWEST = 4  # sites for which the trouble pays


@dataclass(frozen=True, eq=False)
class Part:
    """A value at a cut, with its entries by site.

    Attributes:
        value: the value.
        entries: ``(sites, entries of one site)``.
    """

    value: Value
    entries: Tensor


@dataclass(frozen=True, eq=False)
class SitePlan:
    """A segment cut where it ends and where it begins to keep sites apart.

    Attributes:
        sites: the places that the ends keep apart.
        source: the values that the columns run through.
        rows: ``(places in a sample, rows of one place)``, flat coordinates of the target.
        targets: the same rows as entries of the target, by site.
        left: the local part before the target, from the cut to the target.
        carried: values of the source that reach the cut unchanged, and are not needed in the middle for that.
        cut: the other values at the cut.
        middle: the part that mixes, from the values behind it to those at the cut.
        right: the local part after the source, from the source to the values behind the middle that it makes; None
            if the middle begins at the source.
        behind: the values between right and middle.
        columns: the source's entries by site, its tensors laid end to end; None if ``right`` is.
    """

    sites: Sites
    source: tuple[Value, ...]
    rows: Tensor
    targets: Tensor
    left: Segment
    carried: tuple[Part, ...]
    cut: tuple[Part, ...]
    middle: Segment
    right: Segment | None
    behind: tuple[Part, ...]
    columns: Tensor | None


def plan_sites(products: Products) -> SitePlan | None:
    """How a recorded segment can be cut into local and mixing parts; None if its target keeps no sites apart."""
    segment, target = products.segment, products.target
    linears = linear_nodes(segment)
    if len(target.metas) != 1 or target.metas[0].dtype.is_complex or not linears:
        return None
    for axis, length in enumerate(target.axes[0]):
        if length >= _FEWEST and target.size // length >= _FEWEST:
            sites = Sites(target.batch, length)
            found = _plan_axis(segment, linears, target, axis, sites)
            if found is not None:
                return found
    return None


def _plan_axis(segment: Segment, linears: list[Linear], target: Space, axis: int, sites: Sites) -> SitePlan | None:
    position, left_labels = _left_cut(segment, linears, axis_labels(target, axis, sites), sites)
    if position == len(segment.nodes):
        return None
    left = segment.part(position, len(segment.nodes))
    by_site = [entries_by_site(labels, sites.count) for labels in left_labels]
    parts = [Part(value, entries) for value, entries in zip(left.source, by_site, strict=True) if entries is not None]
    if len(parts) < len(by_site):
        return None
    carried = tuple(part for part in parts if part.value in segment.source)
    cut = tuple(part for part in parts if part.value not in segment.source)
    start, behind, columns = _right_cut(segment, linears, position, sites)
    middle = segment.between(
        segment.live(start) if start else segment.source, [part.value for part in cut], start, position
    )
    made = [part.value for part in behind if part.value not in segment.source]
    index = torch.arange(target.size).view(target.axes[0]).movedim(axis, 0).flatten(1)
    table = target.layouts[0].columns(
        torch.arange(target.metas[0].numel).view(target.metas[0].shape), target.metas[0].shape
    )
    return SitePlan(
        sites=sites,
        source=segment.source,
        rows=index,
        targets=table[:, index].flatten(0, 1),
        left=left,
        carried=carried,
        cut=cut,
        middle=middle,
        right=segment.between(segment.source, made, 0, start) if start else None,
        behind=behind,
        columns=columns,
    )


def _left_cut(segment: Segment, linears: list[Linear], labels: Tensor, sites: Sites) -> tuple[int, list[Tensor]]:
    """The earliest linear layer from which on sites stay apart, with the sites of the values before it."""
    stop = len(segment.nodes)
    best, of_best = stop, [labels]
    for linear in reversed(linears):
        found = pulled_labels(segment.part(linear.position, stop), [labels], sites.count)
        if found is None:
            break
        best, of_best = linear.position, found
    return best, of_best


def _right_cut(
    segment: Segment, linears: list[Linear], position: int, sites: Sites
) -> tuple[int, tuple[Part, ...], Tensor | None]:
    """The latest place, behind a linear layer, up to which sites stay apart; 0 if there is none."""
    sizes = [meta_of(value).numel for value in segment.source]
    for start in range(position, linears[0].position, -1):
        values = segment.live(start)
        made = [value for value in values if value not in segment.source]
        found = _consistent(segment, made, start, sites)
        if found is None:
            continue
        behind, source_labels = found
        columns = entries_by_site(torch.cat(source_labels), sites.count)
        if columns is None:
            continue
        of_source = dict(zip(segment.source, source_labels, strict=True))
        kept = [(value, entries_by_site(of_source[value], sites.count)) for value in values if value in of_source]
        if all(entries is not None for _, entries in kept) and sum(sizes) == columns.numel():
            return start, (*behind, *(Part(v, e) for v, e in kept if e is not None)), columns
    return 0, (), None


def _consistent(
    segment: Segment, values: Sequence[Value], start: int, sites: Sites
) -> tuple[list[Part], list[Tensor]] | None:
    """Sites of some values at a cut that agree on which entries of the source belong to which site."""
    agreed: list[Tensor] | None = None
    parts = []
    for value in reversed(values):
        before = segment.between(segment.source, [value], 0, start)
        for labels in possible_labels(meta_of(value), sites):
            found = pulled_labels(before, [labels], sites.count)
            if found is None or (agreed is not None and not _agree(agreed, found)):
                continue
            agreed = found if agreed is None else [torch.maximum(a, f) for a, f in zip(agreed, found, strict=True)]
            entries = entries_by_site(labels, sites.count)
            if entries is not None:
                parts.append(Part(value, entries))
                break
        else:
            return None
    return None if agreed is None else (parts, agreed)


def _agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(bool(((a == b) | (a < 0) | (b < 0)).all()) for a, b in zip(first, second, strict=True))


def arithmetic(plan: SitePlan, segment: Segment) -> float:
    """Multiplications of the plan's parts over those of pulling back every row through the whole segment."""
    count, rows = plan.sites.count, plan.rows.numel()
    inner = sum(part.entries.shape[1] for part in plan.behind)
    total = plan.rows.shape[1] * _operations(plan.left) + rows * _operations(plan.middle)
    if plan.right is not None and plan.columns is not None:
        total += inner * _operations(plan.right)
        total += 2 * rows * count * inner * plan.columns.shape[1]
    return total / max(rows * _operations(segment), 1)


def _operations(segment: Segment) -> int:
    """Floating-point operations of one backward pass, by torch's own count of products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    cotangents = random_tensors(segment.target, 0)
    with FlopCounterMode(display=False) as counter:
        segment.vjp(cotangents)
    return int(counter.get_total_flops())
