"""Dropout of the predictions themselves: a floor under the loss that no weights get below.

With a share p of the predictions set to zero, and the others divided by 1 - p, the mean squared error is at least
p E[y^2], with predictions of (1 - p) y, which are what evaluation then gives. Of logits, the right one is zero with
probability p, and so are some of the others: the cross entropy is at least p E[log(1 + K)], K binomial of the other
classes, that of one logit p log 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import LOSS, Action, Finding, of_last_step
from stabkit.diagnosis.losses.binary_cross_entropies import binary_cross_entropy
from stabkit.diagnosis.losses.loud_logits import cross_entropies
from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.short_training import compared, short_training
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above, path_of
from stabkit.vocabulary import activation_of

_FLOOR = 0.05  # of the variance of the targets, or of the loss of equal chances: a floor from which it is no noise
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_REFERENCE = "Srivastava et al., Dropout, 2014: units of the input and of hidden layers are dropped, not the outputs"


@dataclass(frozen=True)
class _Dropped:
    """Predictions that are dropped.

    Attributes:
        node: the dropout.
        share: the share of the predictions that are set to zero.
        floor: what the loss of them cannot get below.
        scale: what the loss is without a model.
        words: what they are, what the floor is of, and what the loss is without a model.
    """

    node: Node
    share: float
    floor: float
    scale: float
    words: tuple[str, str, str]


def last_dropout_findings(run: TrainingRun) -> list[Finding]:
    """A finding where dropout is the last thing before a loss."""
    assert run.done.loss is not None
    found = next(iter(_dropped(run.done)), None)
    if found is None:
        return []
    path = path_of(run.done, found.node)
    what, of, without = found.words
    evidence = (
        f"dropout{f' ({path})' if path else ''} is the last thing before the loss: it sets {found.share:.0%} of the "
        f"{what} to zero and divides the others by {1 - found.share:.3g}, so that {of} cannot fall below "
        f"{found.floor:.3g} on average, whatever the weights are; {without} {found.scale:.3g}"
    )
    module = dict(run.call.module.named_modules()).get(path) if path else None
    actions: Sequence[Action] = (remedies.activate(path, "Identity"),) if isinstance(module, _DROPOUTS) else ()
    if actions:
        plain, treated = short_training(run.flow, run.loss), short_training(run.flow, run.loss, actions)
        evidence += compared(plain, treated, "without it")  # no verdict: a floor lies below what so few steps reach
    return [
        of_last_step(
            run.flow,
            "loss",
            "warning" if found.floor > _FLOOR * found.scale else "info",
            path or LOSS,
            evidence=evidence,
            remedy="take the dropout at the end away, or put it before the last layer",
            reference=_REFERENCE,
            numbers={"floor": found.floor, "share": found.share, "scale": found.scale},
            actions=tuple(actions),
        )
    ]


def _dropped(done: TrainingPass) -> list[_Dropped]:
    assert done.loss is not None
    found = []
    for regression in regressions(done):
        node, share = dropout_behind(regression.node)
        if node is not None:
            y = regression.targets.double()
            spread, floor = float((y - y.mean()).square().mean()), share * float(y.square().mean())
            words = ("predictions", "their mean squared error", "the mean of the targets alone leaves")
            found.append(_Dropped(node, share, floor, spread, words))
    for entropy in cross_entropies(done.loss):
        node, share = dropout_behind(entropy.softmax.next_functions[0][0], ("LogSoftmax",))
        if node is not None:
            floor = share * _expected_log(entropy.classes - 1, share)
            words = ("logits", "their cross entropy", "equal chances cost")
            found.append(_Dropped(node, share, floor, entropy.chance, words))
    for each in nodes_above(done.loss):
        binary = binary_cross_entropy(each)
        node, share = dropout_behind(binary.node) if binary is not None else (None, 0.0)
        if binary is not None and node is not None:
            words = ("logits", "their cross entropy", "the same for all costs")
            found.append(_Dropped(node, share, share * binary.undecided, binary.chance, words))
    return found


def _expected_log(count: int, share: float) -> float:
    """E[log(1 + K)] of a binomial K, from the logarithms of its probabilities, which themselves may underflow."""
    k = torch.arange(count + 1, dtype=torch.float64)
    ways = math.lgamma(count + 1) - (k + 1).lgamma() - (count - k + 1).lgamma()
    chance = (ways + k * math.log(share) + (count - k) * math.log1p(-share)).exp()
    return float(chance @ k.log1p())


def dropout_behind(node: Node | None, through: Sequence[str] = ()) -> tuple[Node | None, float]:
    """The dropout that a value comes from by views and what keeps zero, with its share; None without one.

    Args:
        node: what made the value.
        through: operations besides that leave the loss what it is: a second LogSoftmax does nothing.
    """
    made: Any = behind_moves(node)
    while made is not None:
        share = _share(made)
        if share:
            return made, share
        if not _keeps_zero(made) and operation(made) not in through:
            return None, 0.0
        made = behind_moves(made.next_functions[0][0])
    return None, 0.0


def _keeps_zero(node: Node) -> bool:
    """Whether it is an activation with f(0) = 0, so that what is dropped is a prediction of zero behind it as well."""
    facts = activation_of(node)
    return facts is not None and facts.function is not None and float(facts.function(torch.zeros(1))) == 0.0


def _share(node: Any) -> float:
    """The share that a dropout drops, as it is written out: a product with numbers that are 0, or 1 / (1 - p)."""
    if operation(node) == "NativeDropout":
        return float(node._saved_p)
    if operation(node) != "Mul":
        return 0.0
    parents = [parent for parent, _ in node.next_functions]
    if len(parents) > 1 and parents[1] is not None:
        return 0.0
    noise = node._saved_other
    if not isinstance(noise, Tensor) or noise.numel() < 2:
        return 0.0
    large = float(noise.max())
    if not (math.isfinite(large) and large > 1.0) or not bool(((noise == 0) | (noise == large)).all()):
        return 0.0
    share, zeros = 1 - 1 / large, float((noise == 0).double().mean())
    # four standard deviations of the share of zeros among so many draws
    return share if abs(zeros - share) <= 4 * math.sqrt(share * (1 - share) / noise.numel()) else 0.0
