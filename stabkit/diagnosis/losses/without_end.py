"""Losses that fall without end: a sign that is wrong, a distance that nothing holds, weights that may be negative.

That a loss lies below zero says nothing: likelihoods of densities do. Where its operations leave its lower end open, it
is followed on a copy by steps that grow from small ones to some that no minimum survives. What has an end rises again,
or stays; what has none falls the faster, and goes on falling from the lowest point at small steps. Then the term that
fell is looked up, and its sign is turned on trial.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step, serious
from stabkit.diagnosis.losses.poles import pole_findings
from stabkit.diagnosis.losses.signs import signs_of
from stabkit.diagnosis.losses.terms import Evaluated, Term, evaluated, is_linear_in, through_another_net
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import LARGEST, carried_out, is_small
from stabkit.diagnosis.remedies.usual_training import Update, adam, moved_by, sgd
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import value_of
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.randomness import seeded
from stabkit.tracing.recording.training_pass import nodes_above

#: steps of Adam from its default rate up to 6, where no minimum is left; what has none falls the faster
_GROWING = tuple(1e-3 * 1.2**step for step in range(48))
#: usual ones, for what has no end while something else is kept in order, as a reconstruction beside a KL
_STEADY = (0.03,) * 80
_FURTHER, _AGAIN = 15, 0.1  # steps on from the lowest point, at a share of the rate that led there
#: times the size of the terms, and of one unit of each, that a loss must fall by growing and by steady steps. Of 70
#: losses that have an end the farthest fell 1.4 and 8.8 times that, likelihoods of data in units of 1e-3; of 24 that
#: have none the least fell 16 and 26 times as far by one of the two
_FAR, _FAR_STEADILY = 3.0, 15.0
_BEYOND = 1e6  # of the same: no error of the steps explains that
_STILL = (
    0.1  # of the fall so far that steps from the lowest point must add: at an end that was overshot they add little
)
_FASTER = 1.2  # times the fall in the middle third of steady steps that the last third must bring
_MOST = 0.5  # of the fall that one term must show
_RATE, _LONG = 1e-2, 150  # of plain gradient descent, by which weights of 1 come to little, and so many steps
_CLEARLY = 0.02  # of what the terms are at the start
_LEFT = 0.01  # of a loss, down to which weights of its terms bring it by themselves
_KENDALL = "Kendall, Gal and Cipolla, Multi-task learning using uncertainty to weigh losses, 2018"
_REFERENCE = "Goodfellow, Bengio and Courville, Deep learning, 2016, section 6.2"


def without_end_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where a loss has no lower end, or where the weights of its terms take it to zero by themselves.

    A loss that is known to be wrong is said once.
    """
    if run.done.loss is None or any(finding.kind == "loss" and serious(finding) for finding in others):
        return []
    if not is_small(run.call.module, LARGEST):
        return []
    own = {id(p) for p in run.done.parameters.values()}
    try:
        if poles := pole_findings(run):
            return poles
        bounded = signs_of(run.done.loss.grad_fn).below
        if (bounded and not _has_free_factor(run.done.loss)) or is_linear_in(run.done.loss, run.done.output):
            return []
        if through_another_net(run.done.loss, own):
            return []
        return _of_free_weights(run.flow, run.loss, run.call) or (
            [] if bounded else _falling(run.flow, run.loss, run.call)
        )
    except (StabkitError, RuntimeError, ValueError):
        return []


def _has_free_factor(scalar: Tensor) -> bool:
    """Whether a scalar or vector that is a parameter has a place in the loss beside those of layers."""
    return any(
        isinstance(leaf, nn.Parameter) and leaf.dim() < 2
        for leaf in (getattr(node, "variable", None) for node in nodes_above(scalar))
    )


@dataclass(frozen=True)
class _Fall:
    """A loss that was followed.

    Attributes:
        first: at the beginning.
        last: at the lowest point.
        before: its terms at the beginning.
        after: its terms at the lowest point.
        goes_on: whether it falls on from there.
        names: of the parameters that were moved and are the model's.
    """

    first: float
    last: float
    before: Evaluated
    after: Evaluated
    goes_on: bool
    names: tuple[str, ...] = ()


Turned = Callable[[Evaluated], Tensor]


@contextlib.contextmanager
def _prepared(
    call: ForwardPass, loss: Any, only: Callable[[Evaluated], Sequence[Tensor]] | None = None
) -> Iterator[tuple[Evaluated, list[Tensor]]]:
    """A model whose parameters may be moved for a while, its first pass, and what is to be moved."""
    model = call.module
    held = [remedies.scale(path, 1.0) for path, p in model.named_parameters() if p.requires_grad]
    with carried_out(model, held), call.kept(loss), torch.enable_grad(), contextlib.ExitStack() as undoing:
        before = evaluated(call, loss)
        weights = _weights(model, before) if only is None else list(only(before))
        own = {id(p) for p in model.parameters()}
        for weight in weights:
            if id(weight) not in own:  # one of the loss: no copy stands in for it
                undoing.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.clone()
        yield before, weights


def _weights(model: nn.Module, before: Evaluated) -> list[Tensor]:
    """The parameters of the model, and those of the loss."""
    own = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    known = {id(p) for p in own}
    leaves = [node.variable for node in nodes_above(before.loss) if hasattr(node, "variable")]
    return [*own, *(p for p in leaves if isinstance(p, nn.Parameter) and id(p) not in known)]


def _value(call: ForwardPass, loss: Any, turned: Turned | None) -> Callable[[], Tensor]:
    """Makes the loss anew, or another of its terms."""

    def made() -> Tensor:
        if turned is not None:
            return turned(evaluated(call, loss))
        seeded(call.seed)
        found: Tensor = loss(call.called())
        return found

    return made


def _followed(
    call: ForwardPass,
    loss: Any,
    only: Callable[[Evaluated], Sequence[Tensor]] | None = None,
    turned: Turned | None = None,
) -> _Fall | None:
    """Follow a loss down by growing steps of its parameters, and on from the lowest point by small ones.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output.
        only: which parameters alone are moved, and no further; None for all, those of the loss among them.
        turned: makes another loss of what was evaluated.
    """
    with _prepared(call, loss, only) as (before, weights):
        if not before.terms or not weights:
            return None
        moved = {id(w) for w in weights}
        names = tuple(path for path, p in call.module.named_parameters() if id(p) in moved)
        size = sum(term.size for term in before.terms)
        value = _value(call, loss, turned)
        start = [w.detach().clone() for w in weights]
        for rates in (_GROWING,) if only is not None else (_GROWING, _STEADY):
            _put(weights, start)
            down = _descent(value, weights, rates)
            _put(weights, down.lowest)
            after = evaluated(call, loss)
            if only is None and _without_end(down, size, rates, value, weights):
                break
        else:
            return _Fall(down.values[0], down.low, before, after, False, names)
        low = -math.inf if down.values[-1] == -math.inf else down.low
        return _Fall(down.values[0], low, before, after, True, names)


def _without_end(
    down: _Descent, size: float, rates: Sequence[float], value: Callable[[], Tensor], weights: Sequence[Tensor]
) -> bool:
    """Whether a way down says that there is no end; from its lowest point, where the weights are, it is tried on."""
    fall = down.values[0] - down.low
    if down.values[-1] == -math.inf or fall > _BEYOND * size:
        return True
    if rates is _STEADY:
        if down.count <= len(rates) or fall <= _FAR_STEADILY * size:
            return False
        one, two, three = (down.values[place] for place in (len(rates) // 3, 2 * len(rates) // 3, -1))
        return two - three > _FASTER * (one - two)
    if fall <= _FAR * size:
        return False
    on = _descent(value, weights, [_AGAIN * rates[min(down.place, len(rates) - 1)]] * _FURTHER)
    return down.place == down.count - 1 or down.low - on.low > _STILL * fall


def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


@dataclass(frozen=True)
class _Descent:
    """Values on a way down, up to the first that is not finite, how many are, and the lowest with its weights."""

    values: tuple[float, ...]
    count: int
    low: float
    place: int
    lowest: tuple[Tensor, ...]


def _descent(
    value: Callable[[], Tensor], weights: Sequence[Tensor], rates: Sequence[float], by: Callable[[float], Update] = adam
) -> _Descent:
    """Steps of an optimizer at some rates, one for each; they end where something is not finite or not taken."""
    states: list[list[Tensor]] = [[] for _ in weights]
    values: list[float] = []
    low, place, lowest = math.inf, 0, tuple(w.detach().clone() for w in weights)
    for step, rate in enumerate([*rates, 0.0]):
        try:
            scalar = value()
        except (RuntimeError, ValueError):  # numbers that are no probabilities any more
            break
        values.append(float(scalar.detach()))
        if not math.isfinite(values[-1]):
            break
        if values[-1] < low:
            low, place, lowest = values[-1], step, tuple(w.detach().clone() for w in weights)
        if step < len(rates):
            moved_by(scalar, weights, states, by(rate), step + 1)
    return _Descent(tuple(values) or (math.nan,), sum(map(math.isfinite, values)), low, place, lowest)


def _of_free_weights(flow: Flow, loss: Any, call: ForwardPass) -> list[Finding]:
    """Weights of the terms of a loss that are trained with it, and that nothing keeps from zero or from below it."""
    fall = _followed(call, loss, only=_free)
    if fall is None or not fall.first > 0 or not fall.last < _LEFT * fall.first:
        return []
    names = ", ".join(fall.names) or "parameters of the loss"
    ends = "below zero, and the loss falls without end" if fall.last < 0 else "to zero, and the loss with them"
    evidence = (
        f"{names} multiply terms of the loss and are trained with it, with nothing beside them that holds them: they "
        f"go {ends}; moved alone they take it from {fall.first:.3g} to {fall.last:.3g} while the terms stay what they "
        "are"
    )
    free, held = _trained(call, loss, None), _trained(call, loss, _tasks)
    worse = False
    if free is not None and held is not None:
        worse = free[1] > held[1] + _CLEARLY * free[0]
        evidence += (
            f"; tried on a copy, {_LONG} steps of SGD at {_RATE:g} take the terms themselves from {free[0]:.3g} to "
            f"{free[1]:.3g} as it is, and to {held[1]:.3g} with weights of 1 that are held"
        )
    remedy = (
        "give each weight a logarithm that holds it, exp(-s) * L + s with a trained s (uncertainty weighting), or hold "
        "the weights: numbers, or register_buffer"
    )
    numbers = {"loss": fall.first, "after": fall.last}
    severity = "critical" if fall.last < 0 else "warning" if worse else "info"
    return [of_last_step(flow, "loss", severity, LOSS, evidence, remedy, _KENDALL, numbers)]


def _free(done: Evaluated) -> list[Tensor]:
    """Parameters that are nothing but factors of terms that are never negative."""
    products = {term.node: term for term in done.terms if _weighs_a_loss(term)}
    outside: set[int] = set()
    stack, seen = [value_of(done.loss).node], set[Any]()
    while stack:
        node = stack.pop()
        if node in seen or node in products:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            outside.add(id(node.variable))
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    held = {id(p): p for term in products.values() for p in term.factor if id(p) not in outside}
    return list(held.values())


def _weighs_a_loss(term: Term) -> bool:
    if not term.factor or term.other is None or term.weighted:
        return False
    return signs_of(term.other[0]).positive and bool((term.coefficient >= 0).all())


def _tasks(done: Evaluated) -> Tensor:
    """The terms of a loss without the weights that are trained."""
    parts = [(t.coefficient * (t.value if t.other is None or not t.factor else t.other[1])).sum() for t in done.terms]
    return torch.stack(parts).sum()


def _trained(call: ForwardPass, loss: Any, turned: Turned | None) -> tuple[float, float] | None:
    """What the terms come to without their weights by a short training, of the loss or of another."""
    with _prepared(call, loss) as (before, weights):
        done = _descent(_value(call, loss, turned), weights, [_RATE] * _LONG, sgd)
        first, last = (float(_tasks(each).detach()) for each in (before, evaluated(call, loss)))
    return (first, last) if math.isfinite(done.values[-1]) else None


def _falling(flow: Flow, loss: Any, call: ForwardPass) -> list[Finding]:
    """A loss that falls without end, and the term that does."""
    fall = _followed(call, loss)
    if fall is None or not fall.goes_on or len(fall.before.terms) != len(fall.after.terms):
        return []
    parts = [
        (float(before.part.detach()), float(after.part.detach()))
        for before, after in zip(fall.before.terms, fall.after.terms, strict=True)
    ]
    groups: dict[int, list[int]] = {}
    for place, each in enumerate(fall.before.terms):
        groups.setdefault(each.group, []).append(place)
    falls = {group: sum(parts[i][0] - parts[i][1] for i in held) for group, held in groups.items()}
    group = max(falls, key=falls.__getitem__)
    whole = fall.first - fall.last if fall.last > -math.inf else sum(falls.values())
    if not falls[group] > _MOST * whole:
        return []  # of what no term shows, nothing is said
    term = fall.before.terms[max(groups[group], key=lambda i: parts[i][0] - parts[i][1])]
    if term.weighted or term.score:
        return []
    alone = len(groups) == 1
    words = "the loss" if alone else f"the term of {term.name}{f' ({term.line})' if term.line else ''}"
    first, last = (sum(parts[i][end] for i in groups[group]) for end in (0, 1))
    low = f"{fall.last:.3g}, and it falls on from there" if fall.last > -math.inf else "minus infinity"
    evidence = f"the loss has no lower end: on a copy, steps of Adam take it from {fall.first:.3g} to {low}"
    if not alone:
        others = [part for i, part in enumerate(parts) if i not in groups[group]]
        evidence += (
            f"; what falls is {words}, from {first:.3g} to {last:.3g}, while the others go from "
            f"{sum(part[0] for part in others):.3g} to {sum(part[1] for part in others):.3g}"
        )
    evidence += _by_turning(call, loss, group, alone)
    remedy = (
        f"turn the sign of {words} where it is meant to become small (an error, a negative log-likelihood, a KL "
        "divergence, minus the log-determinant of a flow); where it is meant to grow, bound it: a margin behind which "
        "it is zero, relu(near - far + margin), normalised vectors, a clamp"
    )
    path = fall.before.path_of(term)
    numbers = {"loss": fall.first, "after": fall.last, "term": last}
    return [of_last_step(flow, "loss", "critical", path or LOSS, evidence, remedy, _REFERENCE, numbers)]


def _by_turning(call: ForwardPass, loss: Any, group: int, alone: bool) -> str:
    """What a loss does with the sign of a term turned, in words; empty where that has no end either."""

    def turned(done: Evaluated) -> Tensor:
        return done.loss - 2 * torch.stack([term.part for term in done.terms if term.group == group]).sum()

    fall = _followed(call, loss, turned=turned)
    if fall is None or fall.goes_on:
        return ""
    what = "its sign" if alone else "the sign of that term"
    return f"; with {what} turned the same steps take it from {fall.first:.3g} to {fall.last:.3g}"
