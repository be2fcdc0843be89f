"""A classification loss far above that of equal chances, since the logits are far too large and wrong.

Logits of size s that know nothing of the labels cost about s^2 / 2 nats more than equal chances, log of the number of
classes, which is what a fresh classifier should start from. Training begins by unlearning them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step, serious
from stabkit.diagnosis.inputs.features import changed, features_of
from stabkit.diagnosis.inputs.sizes import Sizes, large_inputs
from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.short_training import STEPS, compared, short_training
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after, sgd
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import nodes_above, path_of, training_pass

_ABOVE = 4.0  # times the loss of equal chances; stock heads of 10 classes that are drawn by fan-out begin at 3
_LOUD = 3.0  # root mean square of centred logits: 4.5 nats above equal chances if they know nothing
_USUAL = 2.0  # of a weight that is drawn with any of the usual gains, of which the largest is 5/3 (that of the tanh)
_BETTER = 0.95  # of the loss after a short training, from which it is clearly lower
_NEAR = 1.5  # times the loss of equal chances, under which a treated loss is one of a fresh classifier
_REFERENCE = "Karpathy, A recipe for training neural networks, 2019: verify the loss at initialisation"


@dataclass(frozen=True)
class CrossEntropy:
    """A cross entropy within a loss.

    Attributes:
        value: its mean over the labels that count.
        classes: how many there are.
        size: root mean square of the logits, each row less its mean.
        softmax: the node of its log-softmax.
        labels: those that count.
    """

    value: float
    classes: int
    size: float
    softmax: Node
    labels: Tensor

    @property
    def chance(self) -> float:
        """What equal chances cost."""
        return math.log(self.classes)


def cross_entropies(loss: Tensor) -> Iterator[CrossEntropy]:
    """Every cross entropy of logits with hard labels behind a loss."""
    for node in nodes_above(loss):
        if operation(node) not in ("NllLoss", "NllLoss2D"):
            continue
        softmax = behind_moves(node.next_functions[0][0])
        if softmax is None or operation(softmax) != "LogSoftmax":
            continue
        saved: Any = node
        logs, labels = saved._saved_self.detach(), saved._saved_target.detach()
        logs, labels = (logs.unsqueeze(0), labels.unsqueeze(0)) if logs.dim() == 1 else (logs, labels)
        counted = labels != saved._saved_ignore_index
        if logs.shape[1] < 2 or not bool(counted.any()):
            continue
        rows = logs.movedim(1, -1)[counted].double()
        own = rows.gather(1, labels[counted].unsqueeze(1))
        size = float((rows - rows.mean(1, keepdim=True)).square().mean().sqrt())
        yield CrossEntropy(-float(own.mean()), int(logs.shape[1]), size, softmax, labels[counted])


def loud_logits_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """Logits that are far too large, tried with smaller ones.

    Sizes that come of another fault are that fault's.
    """
    assert run.done.loss is not None
    for found in cross_entropies(run.done.loss):
        if found.value > _ABOVE * found.chance and found.size > _LOUD and math.isfinite(found.value):
            return [_finding(run, found, any(map(serious, others)))]
    return []


def _finding(run: TrainingRun, found: CrossEntropy, explained: bool) -> Finding:
    made = behind_moves(found.softmax.next_functions[0][0])
    path = "" if made is None else path_of(run.done, made)
    evidence = (
        f"the cross entropy is {found.value:.3g}, and equal chances of {found.classes} classes cost "
        f"{found.chance:.3g}: the logits{f' of {path}' if path else ''} have the size {found.size:.3g} and are wrong, "
        "so that training begins by unlearning them"
    )
    finding = of_last_step(
        run.flow,
        "loss",
        "info",
        path or LOSS,
        evidence=evidence,
        remedy="none is needed where the loss holds a margin or a scale against them on purpose",
        reference=_REFERENCE,
        numbers={"loss": found.value, "chance": found.chance, "logits": found.size, "classes": float(found.classes)},
    )
    if explained:
        return replace(finding, remedy="that of the other findings; then look at the loss again")
    return _by_input(run.flow, run.loss, run.call, found, finding) or _by_weight(run, found, made, finding)


def _by_input(flow: Flow, loss: Any, call: ForwardPass, found: CrossEntropy, finding: Finding) -> Finding | None:
    """The input to blame, where dividing it by its size gives a loss of equal chances."""
    sizes = large_inputs(flow)
    after = None if sizes is None else _cross_entropy(sizes.divided(call), loss)
    if sizes is None or after is None or after > _NEAR * found.chance:
        return None
    return replace(
        finding,
        severity="warning",
        evidence=f"{finding.evidence}; the input has the size {sizes.size:.3g} and not 1, and divided by it the cross "
        f"entropy is {after:.3g}",
        remedy=best_scaling(flow, loss, call, sizes),
        numbers={**finding.numbers, "input_size": sizes.size, "after": after},
    )


def _by_weight(run: TrainingRun, found: CrossEntropy, made: Node | None, seen: Finding) -> Finding:
    """The weight that makes the logits, scaled so that their size is 1: a fault where training gains by that."""
    names = _weight_of(run.call, made)
    if not names:
        return seen
    weight = dict(run.call.module.named_parameters(remove_duplicate=False))[names[0]].detach().double()
    gain = float(weight.std()) * (weight.numel() / found.classes) ** 0.5  # what it makes of states of unit size
    if gain < _USUAL:
        evidence = f"{seen.evidence}; {names[0]} is of usual size, and the state that it reads is not: "
        return replace(
            seen,
            evidence=f"{evidence}{found.size / gain:.3g}",
            remedy="look for what makes the state before it so large; a norm before the head holds it",
        )
    action = remedies.scale(names[0], 1.0 / found.size)
    try:
        with carried_out(run.call.module, [action]):
            after = _cross_entropy(run.call, run.loss)
    except StabkitError:
        return seen
    if after is None or after > _NEAR * found.chance:
        return seen
    plain, treated = short_training(run.flow, run.loss), short_training(run.flow, run.loss, [action])
    if plain is not None and treated is not None and not treated.last < _BETTER * plain.last:
        return replace(seen, remedy="none is needed: this batch is learnt as fast with smaller ones")
    tied = f", which is {' and '.join(names[1:])} too," if len(names) > 1 else ""
    how = compared(plain, treated, "treated")
    was = float(weight.std())
    return replace(
        seen,
        severity="warning",
        evidence=f"{seen.evidence}; tried on a copy: with {names[0]}{tied} times {1 / found.size:.3g} the cross "
        f"entropy is {after:.3g}{how}",
        remedy=f"start {names[0]}{tied} with the standard deviation {was / found.size:.2g} and not {was:.2g}",
        numbers={**seen.numbers, "after": after},
        actions=(action,),
    )


def _cross_entropy(call: ForwardPass, loss: Any) -> float | None:
    try:
        done = training_pass(call, loss, differentiate=False)
    except StabkitError:
        return None
    values = [] if done.loss is None else [found.value for found in cross_entropies(done.loss)]
    return max(values, default=None)


def _weight_of(call: ForwardPass, made: Node | None) -> list[str]:
    """All names of the matrix that a product multiplies with."""
    if made is None:
        return []
    behind = [behind_moves(parent) for parent, _ in made.next_functions]
    leaves: list[Any] = [node for node in behind if node is not None and hasattr(node, "variable")]
    matrices = [leaf.variable for leaf in leaves if leaf.variable.dim() > 1]
    names = call.module.named_parameters(remove_duplicate=False)
    found = [name for name, p in names if any(p is m for m in matrices)]
    mine = [name for name in found if len({id(m) for m in matrices}) == 1]
    return mine[::-1]  # the head is named after the embedding that it shares its weight with


def best_scaling(flow: Flow, loss: Any, call: ForwardPass, sizes: Sizes) -> str:
    """What to do about large inputs, in words, that which trains best in front."""
    found = {id(t): f for name, t in call.given if (f := features_of(flow, name, t)) is not None and f.uneven}
    if not found or sizes.inside:
        return sizes.remedy
    standard = changed(call, lambda t: found[id(t)].standardised(t) if id(t) in found else t)
    ends = [_end(each, loss) for each in (standard, sizes.divided(call))]
    if ends[0] is None or ends[1] is None or not ends[0] < ends[1]:
        return sizes.remedy
    return (
        "standardise every feature where the data are read, (x - mean) / std with the numbers of the training set: "
        f"{STEPS} steps of SGD or Adam take the loss to {ends[0]:.3g} at best, and to {ends[1]:.3g} with all divided "
        f"by {sizes.size:.3g}"
    )


def _end(call: ForwardPass, loss: Any) -> float | None:
    """The loss after a few steps, at the best of the usual optimizers and rates."""
    if evaluated(call, training=True).output is None:
        return None
    first = training_pass(call, loss, differentiate=False).loss
    left = [left_after(call, loss, [by(rate) for rate in RATES]) for by in (sgd, adam)]
    known = [share for share in left if share is not None]
    return min(known) * float(first.detach()) if first is not None and known else None
