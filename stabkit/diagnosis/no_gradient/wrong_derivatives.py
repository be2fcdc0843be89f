"""Backwards written by hand that are not the derivative of their forward: tried by linearity and by differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import Finding, of_last_step
from stabkit.diagnosis.remedies.short_training import ShortTraining, compared, short_training, worse
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.own_functions import Calls, Probe, own_functions, probed, true_derivative, watched
from stabkit.tracing.recording.training_pass import nodes_above, path_of, training_pass

_MOST_FUNCTIONS = 8  # that are tried; a model has one or two
_MOST_CALLS = 2  # of each
_NOTHING = 1e-6  # share in float64 that is rounding
_ALIKE = 0.99  # cosine to the derivative from which a gradient is that, scaled, or reversed, on purpose
_REFERENCE = "https://pytorch.org/docs/stable/notes/extending.html; torch.autograd.gradcheck"


def wrong_derivative_findings(run: TrainingRun) -> list[Finding]:
    """One finding for every function whose backward is at fault."""
    assert run.done.loss is not None
    functions = own_functions(nodes_above(run.done.loss))
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not functions or together:
        return []  # a function that talks to other processes must not be called by one alone
    chosen = list(functions)[:_MOST_FUNCTIONS]
    with watched(chosen) as calls:
        training_pass(run.call, run.loss, differentiate=False)
    found = []
    for function in chosen:
        some = [each for each in calls.made.values() if each.function is function][:_MOST_CALLS]
        with run.call.kept():  # a function that runs a module may write to it
            probes = [probe for each in some if (probe := probed(each)) is not None]
        ignoring = [p for p in probes if _ignores(p)]
        wrong = [p for p in probes if not _ignores(p) and _is_wrong(p)]
        if ignoring or wrong:
            said = _of_ignoring(ignoring[0]) if ignoring else _of_wrong(wrong[0])
            found.append(_finding(function, said, bool(ignoring), functions[function], run))
    return found


def _ignores(probe: Probe) -> bool:
    """Whether it puts out something where nothing comes back; of a loss, to which a 1 comes back, that may be right."""
    if probe.ignoring <= _NOTHING:
        return False
    if probe.outputs == 1 and probe.true is not None:
        return _error(probe) > 1 - _ALIKE
    return probe.outputs > 1


def _is_wrong(probe: Probe) -> bool:
    """Whether a linear backward on smooth ground is neither the derivative nor one that is made other on purpose."""
    if not probe.linear or probe.true is None:
        return False
    return any(
        _off(given, true, probe.sent) for given, true in zip(probe.given, probe.true, strict=True) if bool(true.any())
    )


def _off(given: Tensor, true: Tensor, sent: Sequence[Tensor]) -> bool:
    """Whether it differs, where both say something, by more than a factor, and is not what came back itself."""
    straight = any(s.shape == given.shape and abs(_cosine(given, s)) > _ALIKE for s in sent)
    both = (given != 0) & (true != 0)
    return not straight and bool(both.any()) and abs(_cosine(given[both], true[both])) < _ALIKE


def _cosine(one: Tensor, other: Tensor) -> float:
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size > 0 else 0.0


def _error(probe: Probe) -> float:
    """Relative error against the derivative; infinite where that is unknown."""
    if probe.true is None:
        return math.inf
    missed = math.sqrt(sum(float((g - t).square().sum()) for g, t in zip(probe.given, probe.true, strict=True)))
    size = math.sqrt(sum(float(t.square().sum()) for t in probe.true))
    return missed / size if size > 0 else math.inf


def _of_ignoring(probe: Probe) -> str:
    return (
        f"puts out a gradient even where nothing comes back to it ({probe.ignoring:.0%} of what it makes of random "
        "numbers): it does not multiply by what comes back, so that the chain rule ends there"
    )


def _of_wrong(probe: Probe) -> str:
    return (
        "is not the derivative of its forward: tried in float64, where difference quotients confirm the derivative, it "
        f"is off by {_error(probe):.0%}"
    )


def _finding(
    function: type[Function],
    said: str,
    ignoring: bool,
    nodes: Sequence[Node],
    run: TrainingRun,
) -> Finding:
    paths = tuple(dict.fromkeys(path for node in nodes[::-1] if (path := path_of(run.done, node))))
    plain, mended = short_training(run.flow, run.loss), _mended(function, run.flow, run.loss)
    evidence = f"the backward of {function.__name__}{f' (in {listed(paths)})' if paths else ''} {said}"
    evidence += compared(plain, mended, "with the derivative in its place")
    helps = worse(plain, mended)
    # what is no chain rule is a fault where training does not show it either; another gradient may be meant
    harm = helps or (ignoring and not worse(mended, plain))
    remedy = (
        "multiply by grad_output: return grad_output * derivative"
        if ignoring
        else "derive the forward again, or leave the backward to autograd; torch.autograd.gradcheck tells when it is "
        "right"
    )
    return of_last_step(
        run.flow,
        "wrong_derivative",
        "warning" if harm else "info",
        paths[0] if paths else "",
        evidence,
        remedy,
        _REFERENCE,
        {"calls": float(len(nodes))},
    )


def _mended(function: type[Function], flow: Flow, loss: Any) -> ShortTraining | None:
    """A short training in which the function passes back what its forward asks for."""
    with watched([function]) as calls:
        return short_training(flow, loss, altered=lambda scalar: _hang(function, scalar, calls))


def _hang(function: type[Function], scalar: Tensor, calls: Calls) -> None:
    """Replace what the nodes of a function pass back."""
    for node in own_functions(nodes_above(scalar)).get(function, ()):
        made = calls.made.get(node._sequence_nr())
        if made is not None:
            node.register_hook(_derivative_of(made))
    calls.made.clear()


def _derivative_of(made: Any) -> Callable[[Any, Any], Any]:
    def hook(passed: tuple[Tensor | None, ...], sent: tuple[Tensor | None, ...]) -> Any:
        true = true_derivative(made, sent)
        if true is None or len(true) != len(passed):
            return passed
        return tuple(old if new is None else new for old, new in zip(passed, true, strict=True))

    return hook
