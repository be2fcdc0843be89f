"""What starts small before a first norm: tokens of zeros, embeddings of 1e-4.

A norm passes gradients on by one over the size of what it reads, so that the gradient of such a start is as much larger
as the start is smaller. The loss does not see the size: the growth is a change of units and no property of the depth,
and the first training step takes it away, since it moves these entries first and farthest (Arora, Li and Lyu, 2019,
arXiv:1812.03981). It is worth knowing all the same: where gradients are clipped by their norm, nothing else moves in
that step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import Array, Verdict, judge, judged_without
from stabkit.tracing import StateLike


def owed(state: StateLike, pulled: Tensor) -> float:
    """What the gain of a step owes to vectors of its source that are smaller than 1, nats.

    The gain with respect to the same vectors at size 1 is less by that, behind a norm: f(c x) = f(x) has the derivative
    f'(x) / c. A vector is a token of a sequence, or else a sample.

    Args:
        state: the source of the step.
        pulled: ``(batch, size, k)``, random cotangents that were pulled back to it.
    """
    columns = pulled.detach().to(device="cpu", dtype=torch.float64)
    flat = state.flatten().detach().to(columns)
    sizes = torch.cat([_sizes(part, axes) for part, axes in _parts(flat, state)], 1).clamp_max(1.0)
    whole, scaled = columns.square().sum(), (columns * sizes.unsqueeze(-1)).square().sum()
    return 0.5 * float(whole.log() - scaled.log()) if bool(whole > 0) and bool(whole.isfinite()) else 0.0


def _parts(flat: Tensor, state: StateLike) -> list[tuple[Tensor, tuple[int, ...]]]:
    axes = state.space.axes
    return list(zip(torch.split(flat, [math.prod(shape) for shape in axes], dim=1), axes, strict=True))


def _sizes(flat: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The root mean square of the vector that each entry belongs to, ``(batch, size)``."""
    vectors = flat.reshape(len(flat), axes[0], -1) if len(axes) == 2 else flat.unsqueeze(1)
    return vectors.square().mean(-1, keepdim=True).sqrt().expand_as(vectors).reshape(flat.shape)


def from_small_start(
    verdict: Verdict, growth: Array, kinds: tuple[str, ...], start: tuple[str, float], limits: Thresholds
) -> tuple[Verdict, list[Finding]]:
    """The verdict without what an explosion owes to a small start, and that as a fact; both as they were where nothing.

    Args:
        verdict: the verdict on all growth.
        growth: ``(steps, samples)``, nats.
        kinds: kind of every step.
        start: module path of the first block, and what its gain owes to the size of its source.
        limits: the thresholds.
    """
    first, last = verdict.stretch
    path, much = start
    if verdict.name != "exploding" or not math.isfinite(verdict.growth) or much < limits.stable:
        return verdict, []
    much = min(much, max(float(growth[first].mean()), 0.0))  # a small start makes no gradient vanish
    kept = growth.copy()
    kept[first] -= much
    rest = judge(kept, kinds, limits)
    if rest.name == "exploding":
        return verdict, []
    found = Finding(
        kind="exploding",
        severity="info",
        steps=(first,),
        module_path=path,
        confidence=1.0,
        evidence=f"of the log growth {verdict.growth:+.1f} nats over {last - first + 1} steps {much:+.1f} come of what "
        f"is small or zero before the first norm; at size 1 the growth would be {rest.growth:+.1f} nats",
        remedy="none is needed: training moves what is small there first; with gradients clipped by their norm nothing "
        "else moves in the first step, so draw tokens and embeddings of ordinary size (0.02) there",
        reference="Arora, Li and Lyu, Theoretical analysis of auto rate-tuning by batch normalization, 2019",
        numbers={"growth": verdict.growth, "of_small_start": much},
    )
    what = "what is small before the first norm, whose size the loss does not see"
    return judged_without(verdict, rest, what), [found]
