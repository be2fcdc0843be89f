"""Classes of very unequal numbers in a loss that weighs all samples alike: the model predicts the frequent class.

That classes are unequal does no harm where the rare one can be told. So half of the samples are held out, and those are
predicted after training on the others, with all samples weighed alike and with every class as a whole: harm is done
where the rare class is then found, and as it is not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step, serious
from stabkit.diagnosis.remedies.applying import is_small
from stabkit.diagnosis.remedies.usual_training import ADAM, RATES, adam, after_steps
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import nodes_above

_TIMES = 50.0  # how many more the frequent class has, from which a loss is tried
_FREQUENT = 0.9  # share of the labels that it has: where many classes share them, it is not what is predicted
_FEWEST = 6  # rows with labels of rare classes: three in each half
_TOLD, _FOUND, _UNFOUND = 0.5, 0.3, 0.2  # of the held-out labels of rare classes, less false alarms
#: of what a loss is that knows the numbers of labels alone: below, the rare class is told, and more steps predict it.
#: Of classes eight spreads apart .38 was left when none was predicted yet, of 2.2 and less .69 and above
_LEARNT = 0.6
_FALSE = 0.05  # of the frequent class that a model may call rare
_LARGEST = 300_000  # parameters: where it is tried to its end it takes 1500 steps
_FIRST, _SETTLED = 10, 50  # steps, in which a fresh model still calls anything anything
_CHANCE = 0.005  # of finding so many by calling as many samples rare at random
#: of Adam: classes eight spreads apart, 13 in 700, took 400 to be predicted; where fewer do not suffice their loss does
_STEPS, _WEIGHED_STEPS = 300, 150
_BY_LABEL = frozenset({"NllLoss", "NllLoss2D"})
_BINARY = frozenset({"BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"})
_FUNCTIONS = frozenset({"cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"})
_REFERENCE = "King and Zeng, Logistic regression in rare events data, 2001; Lin et al., Focal loss, 2017"


@dataclass(frozen=True)
class _Counts:
    """How many labels each class has."""

    of: tuple[int, ...]

    @property
    def frequent(self) -> int:
        """The class that has most."""
        return max(range(len(self.of)), key=self.of.__getitem__)

    @property
    def rare(self) -> int:
        """The labels of classes that have far fewer."""
        most = self.of[self.frequent]
        return sum(count for count in self.of if 0 < count * _TIMES <= most)

    @property
    def chance(self) -> float:
        """What a loss is that knows of nothing but these numbers."""
        shares = [count / sum(self.of) for count in self.of if count]
        return -sum(share * math.log(share) for share in shares)

    @property
    def unequal(self) -> bool:
        """Whether there are such, and next to all labels are of the frequent class."""
        return self.rare > 0 and self.of[self.frequent] >= _FREQUENT * sum(self.of)


def _counts(name: str, target: Tensor, ignored: int = -100) -> _Counts | None:
    """The labels of a call; None where they are none."""
    if target.is_floating_point():
        if name in ("cross_entropy", "nll_loss") or not bool(((target == 0) | (target == 1)).all()):
            return None
        ones = int(target.sum())
        return _Counts((target.numel() - ones, ones))
    counted = target[(target != ignored) & (target >= 0)]
    return _Counts(tuple(torch.bincount(counted.flatten()).tolist())) if counted.numel() else None


def _is_unequal(node: Any) -> bool:
    name = operation(node)
    if name not in _BY_LABEL | _BINARY or node._saved_reduction == 0:
        return False  # entries that are left apart may be weighed by hand
    if any(isinstance(getattr(node, kept, None), Tensor) for kept in ("_saved_weight", "_saved_pos_weight")):
        return False
    ignored = node._saved_ignore_index if name in _BY_LABEL else -100
    found = _counts("nll_loss" if name in _BY_LABEL else "", node._saved_target.detach(), ignored)
    return found is not None and found.unequal


@dataclass
class _Seen:
    """What was predicted of the samples that are held out: of rare classes, and of the frequent one; and their loss."""

    rare: int = 0
    hits: int = 0
    frequent: int = 0
    alarms: int = 0
    loss: float = 0.0

    def __add__(self, other: _Seen) -> _Seen:
        return _Seen(
            self.rare + other.rare,
            self.hits + other.hits,
            self.frequent + other.frequent,
            self.alarms + other.alarms,
            (self.loss + other.loss) / 2,
        )

    @property
    def found(self) -> float:
        """Share of the labels of rare classes that are predicted as not of the frequent one."""
        return self.hits / max(self.rare, 1)

    @property
    def false(self) -> float:
        """The same share of those of the frequent class."""
        return self.alarms / max(self.frequent, 1)

    @property
    def told(self) -> float:
        """How far the two are apart, from 0 for a model that calls all the same to 1 for one that is right."""
        return self.found - self.false

    @property
    def learnt(self) -> bool:
        """Whether rare classes are told without false alarms, as samples that weigh alike teach to tell them."""
        return self.told >= _TOLD and self.false < _FALSE

    @property
    def by_chance(self) -> float:
        """How likely as many would be found if as many were called rare at random."""
        share = (self.hits + self.alarms + 1) / (self.rare + self.frequent + 2)
        return sum(
            math.exp(
                math.lgamma(self.rare + 1)
                - math.lgamma(k + 1)
                - math.lgamma(self.rare - k + 1)
                + k * math.log(share)
                + (self.rare - k) * math.log1p(-share)
            )
            for k in range(self.hits, self.rare + 1)
        )


@dataclass
class _HeldOut(TorchFunctionMode):
    """Leaves half of the samples out of the first loss whose classes are so unequal, and sees how these are predicted.

    Attributes:
        half: which half is left out.
        weighed: whether every class weighs as much as a whole.
        seen: the predictions of the samples that were left out, at the last call.
        counts: labels by class, and the name of the function.
    """

    half: int
    weighed: bool
    seen: _Seen = field(default_factory=_Seen)
    counts: _Counts | None = None
    name: str = ""

    @property
    def chance(self) -> float:
        """What the loss is of a model that knows the numbers of labels alone."""
        return 0.0 if self.counts is None else self.counts.chance

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _FUNCTIONS:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(func).bind(*args, **(kwargs or {}))
        given = bound.arguments
        target, ignored = given["target"], given.get("ignore_index", -100)
        counts = _counts(name, target, ignored)
        own = given.get("weight") is None and given.get("pos_weight") is None and given.get("reduction") != "none"
        if counts is None or not counts.unequal or not own or target.dim() == 0:
            return func(*args, **(kwargs or {}))
        self.name, self.counts = name, counts
        out = _left_out(target, counts, self.half)
        self.seen = _seen(name, given["input"].detach(), target, counts, out, ignored)
        weights = torch.tensor([sum(counts.of) / (2 * count) if count and self.weighed else 1.0 for count in counts.of])
        if name in ("cross_entropy", "nll_loss"):
            classes = given["input"].shape[1 if given["input"].dim() > 1 else 0]
            weights = torch.cat([weights, weights.new_ones(classes - len(weights))])
            given["target"] = target.masked_fill(out, ignored)
            given["weight"] = weights.to(given["input"])
        else:
            each = weights.to(target)[target.long()] * ~out
            given["weight"] = each * (each.numel() / (~out).sum())
        return func(**given)


def _left_out(target: Tensor, counts: _Counts, half: int) -> Tensor:
    """Which labels lie in a half: every other row that holds a rare class, and every other of the rest."""
    rows = _rare(target, counts).flatten(1).any(1) if target.dim() > 1 else _rare(target, counts)
    place = torch.where(rows, rows.cumsum(0), (~rows).cumsum(0)) % 2 == half
    return place.reshape(-1, *[1] * (target.dim() - 1)).expand(target.shape)


def _rare(target: Tensor, counts: _Counts) -> Tensor:
    rare = torch.tensor([0 < count * _TIMES <= counts.of[counts.frequent] for count in counts.of])
    return rare.to(target.device)[target.long().clamp(0, len(counts.of) - 1)] & (target >= 0)


def _seen(name: str, scores: Tensor, target: Tensor, counts: _Counts, out: Tensor, ignored: int) -> _Seen:
    if name in ("cross_entropy", "nll_loss"):
        predicted = scores.argmax(1 if scores.dim() > 1 else 0) != counts.frequent
    else:
        ones = scores > (0.0 if name.endswith("logits") else 0.5)
        predicted = ones if counts.frequent == 0 else ~ones
    rare = _rare(target, counts) & out
    frequent = (target == counts.frequent) & out & (target != ignored)
    counted = [int(each.sum()) for each in (rare, rare & predicted, frequent, frequent & predicted)]
    with torch.no_grad():
        by_label = name in ("cross_entropy", "nll_loss")
        wanted = target.masked_fill(~out, ignored) if by_label else target
        function = getattr(functional, name)
        each = function(scores, wanted, ignore_index=ignored) if by_label else function(scores[out], target[out])
    return _Seen(counted[0], counted[1], counted[2], counted[3], float(each))


def unequal_class_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where a rare class is not predicted, and is with every class weighed as a whole.

    A loss that is known to be wrong otherwise is said once.
    """
    if run.done.loss is None or any(finding.kind == "loss" and serious(finding) for finding in others):
        return []
    if not any(_is_unequal(node) for node in nodes_above(run.done.loss)) or not is_small(run.call.module, _LARGEST):
        return []
    try:
        plain = None
        for rate in RATES:
            plain = _both(run.call, run.loss, False, rate)
            if plain is None or plain[1].told > _UNFOUND or plain[1].loss < _LEARNT * plain[0].chance:
                return []
        weighed = _both(run.call, run.loss, True, max(RATES))
    except (StabkitError, RuntimeError, ValueError):
        return []
    if plain is None or weighed is None or weighed[1].told < _FOUND or weighed[1].by_chance > _CHANCE:
        return []
    return [_finding(run.flow, plain[0], plain[1], weighed[1])]


def _both(call: ForwardPass, loss: Any, weighed: bool, rate: float) -> tuple[_HeldOut, _Seen] | None:
    """What is predicted of all samples, each after training on the half it is not in; None where it is not tried.

    What is learnt by heart with weights is of no use for others: so the best moment counts, which is the same of both
    halves. Of samples that weigh alike it is the end, and the least loss of those that were held out.
    """
    ways: list[list[_Seen]] = []
    for half in (0, 1):
        mode, way = _HeldOut(half, weighed), list[_Seen]()

        def left(output: Any, mode: _HeldOut = mode, way: list[_Seen] = way) -> Tensor:
            with mode:
                scalar: Tensor = loss(output)
            way.append(mode.seen)
            return scalar

        def enough(mode: _HeldOut = mode, way: list[_Seen] = way) -> bool:
            return mode.counts is None or (not weighed and len(way) > _SETTLED and mode.seen.learnt)

        with after_steps(call, left, adam(rate), _WEIGHED_STEPS if weighed else _STEPS, enough=enough) as finite:
            if not finite or mode.counts is None or mode.seen.rare < _FEWEST // 2:
                return None
        if not weighed and mode.seen.learnt:
            return mode, mode.seen
        ways.append(way[_FIRST:])
    both = [one + two for one, two in zip(*ways, strict=True)]
    best = max(both, key=lambda seen: seen.told) if weighed else both[-1]
    return mode, replace(best, loss=min(seen.loss for seen in both))


def _finding(flow: Flow, mode: _HeldOut, plain: _Seen, weighed: _Seen) -> Finding:
    assert mode.counts is not None
    counts = mode.counts
    total, rare = sum(counts.of), counts.rare
    evidence = (
        f"of {total} labels of {mode.name} {rare} are of rare classes ({rare / total:.2%}), and all weigh alike: each "
        f"half held out in turn on a copy, {_STEPS} steps of {ADAM} on the other find {plain.hits} of {plain.rare} "
        f"labels of rare classes, so that class {counts.frequent} is as good as all that is predicted; with every "
        f"class weighed as a whole they find {weighed.hits}, and call {weighed.false:.1%} of the others rare"
    )
    binary = mode.name == "binary_cross_entropy_with_logits" and counts.frequent == 0
    by = f"pos_weight={counts.of[0] / rare:.3g}" if binary else "weight=total / (classes * count of each)"
    remedy = (
        f"weigh the classes, {by}, or draw batches in which they are balanced, or use a focal loss (dice for masks); "
        f"judge by recall or F1: always to predict class {counts.frequent} is {1 - rare / total:.1%} accurate"
    )
    numbers = {"rare": rare / total, "found": plain.found, "weighed": weighed.found, "false": weighed.false}
    return of_last_step(flow, "loss", "warning", LOSS, evidence, remedy, _REFERENCE, numbers)
