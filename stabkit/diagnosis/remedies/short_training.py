"""Twenty steps of plain gradient descent on a batch, with a model as it is or treated: what a remedy is worth.

The rate is a share of the size of the weights over that of their gradient, so that the units of the loss do not
matter; the best of a few shares counts. The model, its buffers and the random state stay as they were. What several
rules of a diagnosis ask for is trained once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.inputs.sizes import Sizes
from stabkit.diagnosis.remedies.applying import may_train, stood_in, trainable
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.made_once import once
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass

STEPS = 20
_CLEARLY = 0.02  # of the first loss
_MUCH = (
    2.0  # how far a loss falls where a model trains well, and how far above a remedy ends that undoes what it learnt
)
_SHARES = (0.003, 0.03)  # of the size of the weights that the first step moves them by
_SMALLER = (3e-4, 3e-5, 3e-6)  # tried where the loss rises with these: a small layer among large ones


@dataclass(frozen=True)
class ShortTraining:
    """Losses of a short training.

    Attributes:
        first: before it.
        last: after it, at the best of the rates; infinite where all diverge.
        watched: what was watched beside the loss, at the end of each run that was made to its end.
        optimizer: what took the steps.
        rate: its learning rate; NaN where all diverge.
        beside: what else was done to take them, in words.
    """

    first: float
    last: float
    watched: tuple[float, ...] = ()
    optimizer: str = "plain SGD"
    rate: float = math.nan
    beside: str = ""

    def __str__(self) -> str:
        at = f" (rate {self.rate:.6g}{self.beside})" if math.isfinite(self.rate) else ""
        return f"from {self.first:.3g} to {self.last:.3g}{at}" if math.isfinite(self.last) else "beyond every bound"


def short_training(
    flow: Any,
    loss: Any,
    actions: Sequence[Action] = (),
    altered: Callable[[Tensor], None] | None = None,
    within: Callable[[], Any] = contextlib.nullcontext,
    watch: Callable[[Any], float] | None = None,
) -> ShortTraining | None:
    """Losses of a short training with a remedy carried out; None where the model is too large or does not train.

    ``flow`` is a traced pass, or the call alone where nothing could be traced. ``altered`` is called with each loss
    before its gradients are taken, to hang hooks on its graph; each training runs in a context that ``within`` makes,
    and in none that is made outside, since it is not repeated. ``watch`` makes a number of the output at its end.
    """
    call = flow.forward_pass if isinstance(flow, Flow) else flow
    if not isinstance(call, ForwardPass) or not callable(loss):
        return None
    held, words = (loss, altered, within, watch), ("short training", repr(actions))
    return once(lambda: _trained(call, loss, actions, altered, within, watch), call, held, words)


def _trained(
    call: ForwardPass,
    loss: Any,
    actions: Sequence[Action],
    altered: Callable[[Tensor], None] | None,
    within: Callable[[], Any],
    watch: Callable[[Any], float] | None,
) -> ShortTraining | None:
    model = call.module
    if not may_train(model):
        return None
    runs: list[list[float]] = []
    rates: list[float] = []
    watched: list[float] = []
    try:
        for share in (*_SHARES, *_SMALLER):
            if share in _SMALLER and any(run[-1] <= run[0] for run in runs):
                break
            with stood_in(model, actions, within):
                losses, output, rate = _run(call, loss, share, altered)
                rates.append(rate)
                if watch is not None and output is not None:
                    watched.append(watch(output))
                runs.append(losses)
    except (StabkitError, RuntimeError):
        return None
    ends = [run[-1] if math.isfinite(run[-1]) else math.inf for run in runs]
    last = min(ends)
    rate = rates[ends.index(last)] if math.isfinite(last) else math.nan
    return ShortTraining(runs[0][0], last, tuple(watched), rate=rate)


def trained_with(flow: Any, loss: Any, remedy: Remedy) -> ShortTraining | None:
    """Losses of a short training with a remedy of any sort: of the model, of its code, or of the data.

    Of data that are divided the output is taken as it is, and multiplied back where the loss holds it against data of
    the same size: whichever trains better.
    """
    call = flow.forward_pass if isinstance(flow, Flow) else flow
    if remedy.data is None or not isinstance(call, ForwardPass):
        return short_training(call, loss, remedy.actions, within=remedy.within)
    return once(lambda: _of_divided_data(call, loss, remedy), call, (loss,), ("divided data", remedy.data))


def _of_divided_data(call: ForwardPass, loss: Any, remedy: Remedy) -> ShortTraining | None:
    if remedy.data is None:
        return short_training(call, loss)
    divided = remedy.data.divided(call)
    plain, back = (short_training(divided, each) for each in taken_back(loss, remedy.data))
    told = None if back is None else replace(back, beside=f", the output multiplied by {remedy.data.size:.4g}")
    return min((run for run in (plain, told) if run is not None), key=lambda run: run.last, default=None)


def taken_back(loss: Any, data: Sizes | None) -> list[Callable[[Any], Any]]:
    """A loss of the output of data that were divided: as it is, and multiplied back."""
    if data is None:
        return [loss]
    size = data.size

    def back(output: Any) -> Any:
        return loss(map_tensors(output, lambda t: size * t if t.is_floating_point() else t))

    return [loss, back]


def trained_on_either(
    flow: Any, loss: Any, meant: Callable[[Any], Tensor], of_runs: Callable[[Sequence[float]], float]
) -> str:
    """What the loss that is meant comes to by training on the loss as it is, and on itself, in words.

    Nothing is said where the loss that is meant ends no lower by itself, as it may where it holds the output against
    what is made of the same weights.

    Args:
        flow: a traced pass, or a call.
        loss: as it is.
        meant: as it is meant, of the same output.
        of_runs: which end counts of the runs on the loss as it is; of those on itself the least does.
    """

    def watch(output: Any) -> float:
        with torch.enable_grad():  # what mends a loss may go by which tensors carry gradients
            return float(meant(output).detach())

    runs = [short_training(flow, each, watch=watch) for each in (loss, meant)]
    ends = [[end for end in run.watched if math.isfinite(end)] for run in runs if run is not None]
    if len(ends) < len(runs) or not all(ends):
        return ""
    as_it_is, by_itself = of_runs(ends[0]), min(ends[1])
    if not by_itself < as_it_is:  # few steps, or a quantity that moves with the weights: it says nothing
        return ""
    return (
        f"; {STEPS} steps of plain SGD take that to {as_it_is:.3g} by the loss as it is, and to "
        f"{by_itself:.3g} by itself"
    )


def compared(plain: ShortTraining | None, treated: ShortTraining | None, how: str, what: str = "the loss") -> str:
    """What a model comes to as it is and treated, in words to be added; empty where either was not trained."""
    if plain is None or treated is None:
        return ""
    return f"; {STEPS} steps of plain SGD take {what} {plain} as it is, {treated} {how}"


def worse(treated: ShortTraining | None, untreated: ShortTraining | None) -> bool:
    """Whether a treated model ends clearly above one that was left as it is; False where either was not trained.

    A loss that is far too large at the start is no measure of what is clear.
    """
    if treated is None or untreated is None or not math.isfinite(untreated.last):
        return False
    return treated.last > untreated.last + _CLEARLY * min(abs(untreated.first), abs(treated.first))


def clearly_better(treated: ShortTraining, other: ShortTraining) -> bool:
    """Whether a treated model ends clearly below another."""
    if not math.isfinite(other.last):
        return math.isfinite(treated.last)
    return treated.last < other.last - _CLEARLY * min(abs(other.first), abs(treated.first))


def gains(treated: ShortTraining | None, untreated: ShortTraining | None) -> bool:
    """Whether a treated model ends clearly below one that was left as it is, or neither was trained.

    A loss that begins near zero, as that of a policy does, is no measure of what is clear: how far it falls is.
    """
    if treated is None or untreated is None:
        return True
    if not math.isfinite(untreated.last):
        return math.isfinite(treated.last)
    return treated.last < untreated.last - _CLEARLY * max(abs(untreated.first), abs(untreated.first - untreated.last))


def spoils(treated: ShortTraining | None, untreated: ShortTraining | None) -> bool:
    """Whether nothing is learnt any more with a remedy, and something is without it; or far less than without it.

    So it is where training with the remedy ends far above the loss as it stands before any: what it was is undone.
    """
    if treated is None or untreated is None:
        return False
    if undoes(treated, untreated):
        return True
    if not math.isfinite(untreated.last):
        return False
    lost = learns_well(untreated) and treated.last > _MUCH * untreated.last
    return falls(untreated) and (lost or not falls(treated)) and worse(treated, untreated)


def undoes(treated: ShortTraining, untreated: ShortTraining) -> bool:
    """Whether a remedy leaves a loss far above what it is without it, before steps and after them."""
    return 0 < _MUCH * untreated.first < min(treated.first, treated.last)


def learns_well(training: ShortTraining) -> bool:
    """Whether the loss, of one sign, ends at half of where it began or below."""
    return 0 < _MUCH * training.last < training.first


def helps(treated: ShortTraining | None, untreated: ShortTraining | None) -> bool:
    """Whether a remedy may be told, as far as training says: it ends no worse, and better where nothing was learnt."""
    if treated is None or untreated is None:
        return True
    if math.isfinite(untreated.last) and falls(untreated):
        return not worse(treated, untreated)
    return clearly_better(treated, untreated)


def falls(training: ShortTraining) -> bool:
    """Whether the loss ends clearly below where it began."""
    return training.last < training.first - _CLEARLY * abs(training.first)


def _run(
    call: ForwardPass, loss: Any, share: float, altered: Callable[[Tensor], None] | None
) -> tuple[list[float], Any, float]:
    """The losses of one run, its last output and its rate; infinite at last, and None, where it broke off."""
    losses: list[float] = []
    with call.kept(loss), torch.enable_grad():
        weights = list(trainable(call.module).values())
        rate = math.nan
        for _ in range(STEPS + 1):
            output = call.called()
            scalar = loss(output)
            losses.append(float(scalar.detach()))
            if altered is not None:
                altered(scalar)
            grads = torch.autograd.grad(scalar, weights, allow_unused=True)
            if math.isnan(rate):
                norm = _norm([g for g in grads if g is not None])
                rate = share * _norm(weights) / norm if norm > 0 else 0.0
            if not all(g is None or bool(g.isfinite().all()) for g in grads):
                return [*losses, math.inf], None, rate
            _move(weights, grads, rate)
    return losses, output, rate


def _move(weights: Sequence[nn.Parameter], grads: Sequence[Tensor | None], rate: float) -> None:
    with torch.no_grad():
        for weight, grad in zip(weights, grads, strict=True):
            if grad is not None:
                weight.sub_(grad, alpha=rate)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().abs().double().square().sum()) for t in tensors))
