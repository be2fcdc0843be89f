"""Inputs that change nothing: what differs between samples goes in, and what comes out is the same without it.

Each input is exchanged among the samples, with the same random numbers, and the outputs are compared bit for bit. An
input may be ignored on purpose; it is a fault where parameters that are to be trained were made for it and get nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.losses.regressions import Regression, regressions
from stabkit.diagnosis.remedies.moved_weights import moved_weights
from stabkit.diagnosis.remedies.short_training import falls, short_training
from stabkit.diagnosis.states.module_outputs import ModuleOutputs
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass

_MOST_INPUTS = 8  # that are exchanged, each in a pass of its own
_MOST_FEATURES = 4096  # whose gradients are looked through
_DRAWN = 1e-3  # share of the variance of a reconstruction that comes from the input, under which it is noise
_PRIOR = 0.01  # size of a mean, and of the logarithm of a variance, that are those of a standard normal prior
_BOWMAN = "Bowman et al., Generating sentences from a continuous space, 2016, section 3.1"
_REFERENCE = "Karpathy, A recipe for training neural networks, 2019: use backprop to chart dependencies"


def unused_input_findings(run: TrainingRun) -> list[Finding]:
    """Findings on inputs that change nothing, on features that do not, and on a reconstruction that is not one."""
    given = run.call.given
    count = next((len(t) for _, t in given if t.dim() > 0), 0)
    varying = [(path, t) for path, t in given if _varies(t, count)]
    found = []
    if 1 < len(varying) <= _MOST_INPUTS:  # one that matters is there anyhow: the flow begins at it
        plain = ModuleOutputs(run.call.module)
        one = evaluated(run.call, mode=lambda _: plain, training=True)
        for path, tensor in varying:
            found += _of_input(run, plain, one, path, tensor)
    for path, tensor in varying:
        found += _of_features(run, path, tensor)
        if path == run.flow.source_name:  # another may be given as the target alone
            found += _of_reconstruction(run, path, tensor)
    return found


def _varies(tensor: Tensor, count: int) -> bool:
    """Whether it has a row for every sample, and rows differ."""
    if tensor.dim() == 0 or len(tensor) != count or count < 2 or tensor.layout != torch.strided:
        return False
    return bool((tensor != tensor[:1]).any())


def _exchanged(chosen: Tensor, features: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Every sample gets what the next one has in an input, or in some of its features."""

    def change(tensor: Tensor) -> Tensor:
        if tensor is not chosen:
            return tensor
        rolled = tensor.roll(1, 0)
        return rolled if features is None else torch.where(features, rolled, tensor)

    return change


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors of two outputs are equal, bit for bit; False where there are none."""
    ones, others = [t for _, t in named_tensors(one)], [t for _, t in named_tensors(other)]
    if not ones or len(ones) != len(others):
        return False
    return all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(ones, others, strict=True)
    )


def _of_input(
    run: TrainingRun,
    plain: ModuleOutputs,
    one: Evaluation,
    path: str,
    tensor: Tensor,
) -> list[Finding]:
    """An input that is exchanged, held against the call as it is and what its modules return."""
    moved = ModuleOutputs(run.call.module)
    two = evaluated(run.call, _exchanged(tensor), lambda _: moved, training=True)
    if not _same(one.output, two.output):
        return []
    reached = [p for (p, a), (_, b) in zip(plain.made, moved.made, strict=False) if not _same(a, b)]
    ran = {call.path for call in one.recording.calls}
    lost = [p for p, gradient in run.done.gradients.items() if gradient is None]
    into = tuple(p for p in lost if p.rpartition(".")[0] in reached)
    unrun = tuple(p for p in lost if p.rpartition(".")[0] not in ran)
    holders = into or (() if _is_mask(tensor) else unrun)
    if not holders:
        return []
    how = "it goes into" if into else "nothing is done with it, and nothing with"
    evidence = (
        f"the input {path!r} differs between samples and changes nothing that the model returns: exchanged among the "
        f"samples, every output stays the same bit for bit; {how} {listed(holders)}"
        + (", whose results are not used" if into else "")
    )
    remedy = f"use what is made of {path!r}: add it to a state, or concatenate it; or leave it out, with its parameters"
    home = holders[0].rpartition(".")[0]
    return [of_module(run.flow, "no_influence", "warning", home, evidence, remedy, _REFERENCE)]


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def _of_features(run: TrainingRun, path: str, tensor: Tensor) -> list[Finding]:
    """Features of a table that change nothing, as a fact: which of them a model takes may be meant."""
    if not tensor.is_floating_point() or tensor.dim() != 2 or not 1 < tensor.shape[1] <= _MOST_FEATURES:
        return []
    gradients = [g for g in run.done.inputs if g is not None and g.shape == tensor.shape]
    if len(gradients) != 1:
        return []
    differs = (tensor != tensor[:1]).any(0)
    unused = (gradients[0] == 0).all(0).to(tensor.device) & differs
    if not bool(unused.any()) or bool(unused.all()):
        return []
    one = evaluated(run.call, training=True)
    if not _same(one.output, evaluated(run.call, _exchanged(tensor, unused), training=True).output):
        return []
    numbers = [int(i) for i in unused.nonzero().flatten()]
    evidence = (
        f"{len(numbers)} of the {tensor.shape[1]} features of the input {path!r} differ between samples and change "
        f"nothing that the model returns ({_ranges(numbers)})"
    )
    remedy = "none is needed where the model takes the others on purpose"
    first, told = run.flow.steps[0].module_path, {"unused": float(len(numbers))}
    return [of_module(run.flow, "no_influence", "info", first, evidence, remedy, _REFERENCE, told)]


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges of neighbours.

    Example:
        >>> _ranges([0, 4, 5, 6])
        '0, 4 to 6'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _of_reconstruction(run: TrainingRun, path: str, tensor: Tensor) -> list[Finding]:
    """A reconstruction of an input that does not depend on it: the code between them is ignored, or is noise alone."""
    assert run.done.loss is not None
    if not tensor.is_floating_point():
        return []
    held = [
        each.output for each in regressions(run.done) if each.targets.numel() == tensor.numel() and _holds(each, tensor)
    ]
    index = next((i for i, t in enumerate(_tensors(run.done.output)) if any(_is(t, h) for h in held)), None)
    if index is None:
        return []
    plain, exchanged = (
        _at(evaluated(run.call, change, training=True).output, index) for change in (None, _exchanged(tensor))
    )
    redrawn = _at(evaluated(replace(run.call, seed=run.call.seed + 1), training=True).output, index)
    if plain is None or exchanged is None or redrawn is None:
        return []
    told, noise = _variance(plain, exchanged), _variance(plain, redrawn)
    if told > 0 and not (noise > 0 and told < _DRAWN * noise):
        return []
    if told == 0 and not _is_ignored(run.call, index, tensor):
        return []
    what = "does not depend on it at all" if told == 0 else f"takes {told / (told + noise):.2g} of its variance from it"
    by = ", and the rest from numbers that are drawn" if noise > 0 else ", the same for every sample"
    evidence = (
        f"the loss holds an output against the input {path!r}, and that output {what}{by}: what is between them says "
        "nothing of the input"
    )
    remedy = (
        "let the decoder read the code; where a divergence from a prior has pressed it there, weigh that less at first "
        "(KL warm-up), leave it some nats free of charge (free bits), or make the decoder weaker"
    )
    numbers = {"by_input": told, "by_noise": noise}
    severity = "warning" if told == 0 or (_is_prior(run.done, index) and _stands(run.flow, run.loss)) else "info"
    return [of_module(run.flow, "no_influence", severity, "", evidence, remedy, _BOWMAN, numbers)]


def _is_ignored(call: ForwardPass, index: int, tensor: Tensor) -> bool:
    """Whether an output does not depend on an input at other weights either: a decoder may begin at zero."""
    try:
        with moved_weights(call.module):
            one, two = (evaluated(call, change, training=True).output for change in (None, _exchanged(tensor)))
    except StabkitError:
        return False
    plain, exchanged = _at(one, index), _at(two, index)
    return plain is not None and exchanged is not None and _variance(plain, exchanged) == 0


def _is_prior(done: TrainingPass, index: int) -> bool:
    """Whether a mean and the logarithm of a variance are returned beside, both nearly 0: the posterior is the prior.

    A fresh network has biases there, of the size 1 / sqrt(width).
    """
    others = [t.detach() for i, t in enumerate(_tensors(done.output)) if i != index and t.is_floating_point()]
    near = [t for t in others if t.dim() > 1 and float(t.double().square().mean().sqrt()) < _PRIOR]
    return len(near) > 1


def _stands(flow: Flow, loss: Any) -> bool:
    """Whether a few steps of training do not lower the loss, as they do that of a fresh network."""
    trained = short_training(flow, loss)
    return trained is not None and not falls(trained)


def _tensors(output: Any) -> list[Tensor]:
    return [t for _, t in named_tensors(output)]


def _at(output: Any, index: int) -> Tensor | None:
    tensors = _tensors(output)
    return tensors[index].detach().double() if index < len(tensors) else None


def _holds(each: Regression, tensor: Tensor) -> bool:
    targets = each.targets.reshape(tensor.shape)
    return bool(torch.allclose(targets.to(tensor), tensor.detach(), rtol=1e-4, atol=1e-6))


def _is(tensor: Tensor, output: Tensor) -> bool:
    return tensor.numel() == output.numel() and bool((tensor.detach().flatten() == output.flatten()).all())


def _variance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean()) / 2 if one.shape == other.shape else 0.0
