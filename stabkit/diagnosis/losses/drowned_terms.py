"""Terms of a loss that are reduced otherwise, so that one drowns the other: a KL summed beside an error averaged.

A sum over the batch doubles with it, and a mean stays: so terms that are reduced otherwise weigh something else at each
size of a batch or of an image. Whether that does harm is tried: the loss is trained as it is and with all of its terms
reduced alike. Harm is done where a term then tells samples apart, and as it is not: what is made for one sample serves
the next as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step, serious
from stabkit.diagnosis.losses.reductions import Summand, of_matrices, summands_of
from stabkit.diagnosis.losses.terms import Evaluated, evaluated
from stabkit.diagnosis.remedies.applying import may_train
from stabkit.diagnosis.remedies.usual_training import ADAM, RATES, adam, after_steps
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import nodes_above

_FEWEST = 4  # rows of a term, below which sum and mean are the same for all that matters
_APART = 8.0  # entries of a row that one term averages where another sums its own, from which it is tried
#: shares of a term that telling samples apart takes away: next to none, and so much that it is learnt. Of ten models
#: followed for 2000 steps it was .05 at most in those that stayed so, and .85 or more in those that learned
_NOTHING, _MUCH = 0.1, 0.1
_ROUNDING = 1e-5
_STEPS = 150  # of Adam; a decoder of a few layers leaves the mean of its images in less
_REFERENCE = "Kingma and Welling, Auto-encoding variational Bayes, 2014; Lucas et al., Posterior collapse, 2019"


@dataclass(frozen=True)
class _End:
    """A summand after a training: what it is, and what it is where samples are given what was made for another."""

    value: float
    of_others: float

    @property
    def gain(self) -> float:
        """What telling samples apart takes away of it."""
        return self.of_others - self.value

    @property
    def apart(self) -> float:
        """The same as a share of it."""
        return self.gain / self.of_others if self.of_others > 0 else 0.0


_ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MseLoss": functional.mse_loss,
    "SmoothL1Loss": functional.smooth_l1_loss,
    "BinaryCrossEntropy": functional.binary_cross_entropy,
    "BinaryCrossEntropyWithLogits": functional.binary_cross_entropy_with_logits,
}

_Ends = tuple[_End, ...]
_Factors = tuple[float, ...]


def drowned_term_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where a term of the loss is not learnt, and is with all terms reduced alike.

    A loss that is known to be wrong otherwise is said once.
    """
    if run.done.loss is None or any(finding.kind == "loss" and serious(finding) for finding in others):
        return []
    found = summands_of(run.done.loss)
    if not _differ(found) or not _differ([each for each in found if of_matrices(each)]):
        return []
    if not may_train(run.call.module):
        return []
    try:
        return _tried(run, found)
    except (StabkitError, RuntimeError, ValueError):
        return []


def _differ(found: Sequence[Summand]) -> bool:
    """Whether two summands are reduced otherwise: over samples, or over the entries of each."""
    held = [each for each in found if each.shape[0] >= _FEWEST]
    across = {each.of_rows for each in held}
    inside = max((e.summed for e in held), default=1.0), max((e.averaged for e in held), default=1.0)
    return len(held) > 1 and (len(across) > 1 or (inside[0] > 1 and inside[1] >= _APART))


def _as_sums(each: Summand) -> float:
    """What makes a summand one that is summed over the entries of a row and averaged over rows."""
    return each.averaged / (each.shape[0] if each.of_rows == "sum" else 1)


def _as_means(each: Summand) -> float:
    """What makes a summand one that is averaged over all."""
    return 1 / each.summed / (each.shape[0] if each.of_rows == "sum" else 1)


#: ways to reduce all summands alike, the likelihood first: of independent entries it is their sum
_WAYS: dict[str, Callable[[Summand], float]] = {
    "each of them summed over the entries of a row and averaged over rows": _as_sums,
    "each of them averaged over all of its entries": _as_means,
}


def _tried(run: TrainingRun, found: Sequence[Summand]) -> list[Finding]:
    loss, call = run.loss, run.call
    begun = evaluated(call, loss)
    if any(each.value not in begun.made for each in summands_of(begun.loss)):
        return []
    # what does not mind whose output it is given has nothing to tell apart
    held = [place for place, end in enumerate(_ends(call, loss)) if abs(end.apart) > _ROUNDING]
    plain = _best(call, loss, (1.0,) * len(found), held, lambda end: end.apart >= _NOTHING)
    still = [place for place in held if plain and plain[place].apart < _NOTHING]
    for words, factor in _WAYS.items() if still else ():
        factors = tuple(factor(each) for each in found)
        treated = _best(call, loss, factors, still, lambda end: end.apart > _MUCH)
        for place in still if treated else ():
            if treated[place].apart > _MUCH and plain[place].gain < _NOTHING * treated[place].gain:
                return [_finding(run.flow, begun, found, place, words, factors, plain[place], treated[place])]
    return []


def _best(
    call: ForwardPass, loss: Any, factors: _Factors, places: Sequence[int], enough: Callable[[_End], bool]
) -> _Ends:
    """Each summand after a training, at the rate after which it tells samples apart best; empty where none is made.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        factors: what each summand is multiplied by.
        places: the summands that matter.
        enough: says of one of these that it needs no other rate.
    """
    best: _Ends = ()
    for rate in RATES if places else ():
        if (run := _trained(call, loss, factors, rate)) is None:
            continue
        best = tuple(max(ends, key=lambda end: end.apart) for ends in zip(best or run, run, strict=True))
        if all(enough(best[place]) for place in places):
            break
    return best


def _trained(call: ForwardPass, loss: Any, factors: _Factors, rate: float) -> _Ends | None:
    """The summands of a loss after some steps of Adam, each multiplied by a factor; None where it diverges."""

    def weighed(scalar: Tensor) -> None:
        for summand, factor in zip(summands_of(scalar), factors, strict=True):
            if factor != 1.0:
                summand.value.node.register_prehook(functools.partial(_times, factor))

    with after_steps(call, loss, adam(rate), _STEPS, weighed) as finite:
        return _ends(call, loss) if finite else None


def _ends(call: ForwardPass, loss: Any) -> _Ends:
    done = evaluated(call, loss)
    others = evaluated(call, lambda output: loss(_passed_on(output)))
    if any(tensor.dim() > 0 for _, tensor in named_tensors(done.output)):
        return tuple(map(_End, _values(done), _values(others)))
    ends = []
    for value, each in zip(_values(done), summands_of(done.loss), strict=True):  # the model gives out its loss alone
        shares = _share_of_others(each)
        ends.append(_End(value, value if shares is None else value * shares))
    return tuple(ends)


def _share_of_others(summand: Summand) -> float | None:
    """How many times as large an error of outputs beside targets is for those of others; None for anything else."""
    node: Any = summand.value.node
    while operation(node) not in _ERRORS and len(inner := [each for each, _ in node.next_functions if each]) == 1:
        node = inner[0]
    error = _ERRORS.get(operation(node))
    if error is None:
        return None
    output, target = node._saved_self.detach(), node._saved_target.detach()
    own = float(error(output, target))
    return float(error(output.roll(1, 0), target)) / own if own > 0 else None


def _times(factor: float, gradients: Any) -> Any:
    return tuple(None if each is None else factor * each for each in gradients)


def _passed_on(output: Any) -> Any:
    """What a model returns, each sample with what was made for the one before it."""
    return map_tensors(output, lambda t: t.roll(1, 0) if t.dim() > 0 else t)


def _values(done: Evaluated) -> list[float]:
    return [float(_part(done, each).detach()) for each in summands_of(done.loss)]


def _part(done: Evaluated, summand: Summand) -> Tensor:
    return summand.coefficient * done.made[summand.value][2].sum()


def _finding(
    flow: Flow,
    begun: Evaluated,
    found: Sequence[Summand],
    place: int,
    words: str,
    factors: _Factors,
    plain: _End,
    treated: _End,
) -> Finding:
    quiet = found[place]
    loud = min((i for i in range(len(found)) if i != place), key=lambda i: factors[i])
    names = [_name(begun, each) for each in summands_of(begun.loss)]
    times = factors[place] / factors[loud]
    evidence = (
        f"two terms of the loss are reduced otherwise: {names[place]} is {quiet.words}; {names[loud]} is "
        f"{found[loud].words}, which makes it {times:.3g} times as heavy beside the first as with {words}"
        f"{_pulls(begun, place, loud)}; tried on a copy, {_STEPS} steps of {ADAM} leave {plain.value:.3g} of "
        f"{names[place]}, and {plain.of_others:.3g} where each sample is given what was made for another, so that "
        f"nothing of a sample is learnt; with {words} they leave {treated.value:.3g}, and {treated.of_others:.3g} with "
        "what was made for another"
    )
    remedy = (
        f"reduce the terms of the loss alike, {words} (of a VAE: reconstruction and KL both summed over a sample and "
        f"divided by the batch size), or multiply {names[loud]} by a weight of about {1 / times:.2g} and raise it "
        "slowly; then a weight between them means the same at every size"
    )
    numbers = {"times": times, "left": plain.value, "treated": treated.value}
    return of_last_step(flow, "loss", "warning", LOSS, evidence, remedy, _REFERENCE, numbers)


def _name(begun: Evaluated, summand: Summand) -> str:
    function, line, _ = begun.made[summand.value]
    return f"{function} ({line})" if line else function


def _pulls(begun: Evaluated, place: int, loud: int) -> str:
    """The gradients of two summands on the parameters that both reach, in words; empty where there are none."""
    parts = [_part(begun, each) for each in summands_of(begun.loss)]
    weights = [
        leaf for node in nodes_above(begun.loss) if isinstance(leaf := getattr(node, "variable", None), nn.Parameter)
    ]
    pulls = [torch.autograd.grad(parts[i], weights, retain_graph=True, allow_unused=True) for i in (place, loud)]
    shared = [(a, b) for a, b in zip(*pulls, strict=True) if a is not None and b is not None]
    sizes = [math.sqrt(sum(float(g[i].abs().double().square().sum()) for g in shared)) for i in (0, 1)]
    if not shared:
        return ""
    return f"; on the parameters that they share their gradients begin at {sizes[0]:.2g} and {sizes[1]:.2g}"
