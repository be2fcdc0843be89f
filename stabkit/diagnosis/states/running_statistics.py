"""Running statistics of batch norms that never caught up with the weights, so that training and evaluation disagree.

While a model trains, a momentum of zero is enough: the statistics stay what they were made with, and evaluation uses
them. Of a model in evaluation there are two ways to see it. What they were made with, mean 0 and variance 1, is still
part of them by (1 - momentum) to the power of the batches seen; that is arithmetic. And a loss on this batch that falls
when the norms use the batch's own statistics is a measurement: one forward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.learning import left_by_a_constant
from stabkit.diagnosis.states.batch_statistics import (
    collected,
    holds_what_it_was_made_with,
    is_fresh,
    standing,
)
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.randomness import seeded

_MADE = 0.05  # share of what statistics were made with, from which they cannot have caught up
#: share of the loss as it is, below which the loss with the batch's own statistics must lie: of statistics that cannot
#: have caught up, and of others, which may as well be right and this batch unlike the training data
_BETTER = {True: 0.8, False: 0.5}
# share of what the model gains over the best constant output that must be lost: a loss that is nearly gone differs by a
# factor for a few samples that training has fitted. A residual network at 98 % of digits loses .4 % of it, stale ones
# over 60 %
_LOST = 0.05
_HALF = 0.5  # of the share that momentum and count claim, which the means must bear out
_FAR = 0.25  # of the size of the output, that it must move by where there is no loss
_REFERENCE = "Wu and Johnson, Rethinking 'Batch' in BatchNorm, 2021; Ioffe and Szegedy, 2015"


def statistics_findings(flow: Flow, loss: Any) -> list[Finding]:
    """Stale running statistics, with what the batch's own ones change, or those that no batch will ever move."""
    never = _never_moved(flow)
    if never:
        return never
    norms = {m: p for p, m in flow.model.named_modules() if isinstance(m, _BatchNorm) and not m.training}
    norms = {m: p for m, p in norms.items() if m.running_mean is not None and not is_fresh(m)}
    made = _as_made(list(norms))
    if not norms or not (made > _MADE or callable(loss)):
        return []
    own = collected(flow, list(norms))
    if own is None:
        return []
    if made > _MADE and _followed(own) > 1.0 - _HALF * made:
        made = 0.0
        if not callable(loss):
            return []
    before, after = _losses(flow, loss, own) if callable(loss) else (math.nan, math.nan)
    moved = math.nan if callable(loss) else _moved(flow, own)
    if not (after < _BETTER[made > _MADE] * before or moved > _FAR):
        return []
    constant = left_by_a_constant(loss, flow.output) if callable(loss) else None
    if constant is not None and before - after < _LOST * (constant - after):
        return []
    worst = max(own, key=lambda norm: _distance(norm, own[norm]))
    return [_finding(flow, norms, worst, made, (before, after), moved)]


def _never_moved(flow: Flow) -> list[Finding]:
    """Norms in training that will be evaluated with mean 0 and variance 1, since their momentum is zero.

    Other statistics may have been loaded and be meant to stay. Told where those of this batch are far from them.
    """
    norms = {m: p for p, m in flow.model.named_modules() if isinstance(m, _BatchNorm) and m.training}
    norms = {m: p for m, p in norms.items() if m.momentum == 0 and holds_what_it_was_made_with(m)}
    own = collected(flow, list(norms)) if norms else None
    if own is None or max(_distance(norm, own[norm]) for norm in norms) < _FAR:
        return []
    worst = max(norms, key=lambda norm: _distance(norm, own[norm]))
    return [
        Finding(
            kind="stale_statistics",
            severity="warning",
            steps=tuple(sorted({step_of(flow, place) for place in norms.values()})),
            module_path=norms[worst],
            confidence=1.0,
            evidence=f"training and evaluation will disagree: momentum=0 in {listed(tuple(norms.values()))} leaves the "
            "running statistics what they were made with, mean 0 and variance 1, whatever is seen in training, and "
            f"evaluation uses them; those of this batch are farthest from it in {norms[worst]}",
            remedy="momentum=0.1, the default: in torch it is the weight of the new batch, 1 - m of libraries in which "
            "m is that of the old statistics",
            reference=_REFERENCE,
            numbers={"momentum": 0.0},
        )
    ]


def _as_made(norms: list[_BatchNorm]) -> float:
    """The largest share of their statistics that is still what they were made with, as momentum and count have it.

    Every variance then holds that share of 1. Where one of a norm with the same momentum and count is smaller, these
    statistics came otherwise: by loading, or as the plain mean over batches that ``update_bn`` takes, which puts the
    momentum back when it is done.
    """
    least: dict[float, float] = {}
    for norm in norms:
        seen = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
        if norm.momentum is not None and norm.running_var is not None and seen:
            made = float((1.0 - norm.momentum) ** seen)
            least[made] = min(least.get(made, math.inf), float(norm.running_var.min()))
    return max((made for made, variance in least.items() if variance >= 0.99 * made), default=0.0)


def _followed(own: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> float:
    """How much of the batch's means the running means have: 1 less the share that is what they were made with."""
    pairs = [
        (norm.running_mean.double(), mean.double()) for norm, (mean, _) in own.items() if norm.running_mean is not None
    ]
    both, alone = (sum(float(a @ b) for a, b in of) for of in (pairs, [(mean, mean) for _, mean in pairs]))
    return both / alone if alone > 0 else 0.0


def _run(flow: Flow, own: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> Any:
    call = flow.forward_pass
    with standing(own), torch.no_grad():
        seeded(call.seed)
        return call.called()


def _losses(flow: Flow, loss: Any, own: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    with torch.random.fork_rng(), torch.no_grad():
        return float(loss(flow.output)), float(loss(_run(flow, own)))


def _moved(flow: Flow, own: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> float:
    """How far the output is from that with the batch's own statistics, beside the size of the latter."""
    with torch.random.fork_rng(), torch.no_grad():
        other = _run(flow, own)
        if not isinstance(other, Tensor) or not isinstance(flow.output, Tensor):
            return math.nan
        return float((flow.output - other).norm() / other.norm().clamp_min(1e-30))


def _distance(norm: _BatchNorm, own: tuple[Tensor, Tensor]) -> float:
    """How far running statistics lie from those of the batch: means in standard deviations, and these in nats."""
    mean, variance = own
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = variance + norm.eps
    shift = (norm.running_mean - mean).square() / scale
    ratio = 0.5 * ((norm.running_var + norm.eps) / scale).log()
    return float(shift.mean().sqrt() + ratio.abs().mean())


def _finding(
    flow: Flow,
    norms: dict[_BatchNorm, str],
    worst: _BatchNorm,
    made: float,
    losses: tuple[float, float],
    moved: float,
) -> Finding:
    path, seen = norms[worst], int(worst.num_batches_tracked if worst.num_batches_tracked is not None else 0)
    before, after = losses
    tried = (
        f"tried on a copy: with the statistics of this batch the loss is {after:.3g} in place of {before:.3g}"
        if math.isfinite(before)
        else f"tried on a copy: with the statistics of this batch the output moves by {moved:.0%} of its size"
    )
    again = (
        "collect the running statistics anew with the weights as they are: torch.optim.swa_utils.update_bn(loader, "
        "model); what is done to this model resets them, and a pass over the data in training mode fills them"
    )
    if made > _MADE:
        why = (
            f"after {seen} batches with momentum {worst.momentum:.3g}, {made:.0%} of what the running statistics hold "
            "is still what they were made with, mean 0 and variance 1"
        )
        remedy = f"{again}; or train more steps, or raise the momentum"
    else:
        why = "the running statistics are not those of this batch"
        remedy = (
            f"{again}; a smaller rate at the end of training lets them catch up. If they are right, this batch is "
            "unlike those that they were collected on"
        )
    return Finding(
        kind="stale_statistics",
        severity="warning",
        steps=tuple(sorted({step_of(flow, place) for place in norms.values()})),  # no fault of the worst one alone
        module_path=path,
        confidence=1.0,
        evidence=f"training and evaluation disagree: {why}, most at {path}; {tried}",
        remedy=remedy,
        reference=_REFERENCE,
        numbers={"as_made": made, "loss": before, "loss_with_own": after, "moved": moved},
        actions=tuple(remedies.reset_statistics(place) for place in norms.values()),
    )


def refill(model: nn.Module, places: list[str], *inputs: Any, **kwargs: Any) -> None:
    """Fill statistics that were reset, by one pass in which these norms alone are in training mode."""
    norms = [model.get_submodule(place) for place in places]
    modes = [(norm, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.train()
        with torch.no_grad():
            model(*inputs, **kwargs)
    finally:
        for norm, mode in modes:
            norm.training = mode
