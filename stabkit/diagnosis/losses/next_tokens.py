"""Losses of the next token, or value: what is to be predicted must not have been seen, or be what was given.

The targets of a loss are held against the tokens that the model is given, at several shifts. Where they are the tokens
one further on, tokens after a position are replaced, and what the model returned up to there must stay.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs.mask_arguments import mask_arguments
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.states.module_outputs import ModuleOutputs, float_outputs
from stabkit.diagnosis.states.sample_meetings import differing
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line, nodes_above

_MATCH = 0.98  # share of targets that are the tokens at a shift
_OTHERWISE = 0.5  # share that may match at another shift: sequences that repeat themselves tell nothing
_FEWEST = 4  # positions
OF_SOFTMAX = "of a softmax over positions"  #: among the numbers of a leak that goes with one
_SOFTMAXES = frozenset({"softmax", "log_softmax"})
_SHIFTS = (-1, 0, 1, 2)
_REFERENCE = "Vaswani et al., Attention is all you need, 2017, section 3.2.3; Radford et al., GPT, 2018, section 3.1"


@dataclass(frozen=True)
class Targets:
    """Targets that are tokens, or values, of an input.

    Attributes:
        tokens: that input, as the call holds it.
        name: its path.
        axis: along which positions lie.
        shift: target t is token t + shift.
        counted: ``(samples, positions)``, where there is a target that counts.
    """

    tokens: Tensor
    name: str
    axis: int
    shift: int
    counted: Tensor


@dataclass(frozen=True)
class Reach:
    """What tokens from one position on change.

    Attributes:
        before: the module that first returns something else for an earlier position; None where none does.
        there: whether the output for that position changes.
    """

    before: str | None
    there: bool


def next_token_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a loss on the tokens of its input can be lowered without learning anything."""
    probes = [(each, reach) for each in _targets(run) if (reach := _reach(run.call, each)) is not None]
    leaks = [(each, reach.before) for each, reach in probes if each.shift == 1 and reach.before is not None]
    if leaks:  # where another input holds the targets, and none is seen early, this one is what an encoder reads
        if not all(reach.before is not None for _, reach in probes):
            return []
        along = _AlongLast(leaks[0][0].tokens.shape[leaks[0][0].axis])
        without = _reach(run.call, leaks[0][0], along)
        of_softmax = along.place if without is not None and without.before is None else ""
        return [_leak(run.flow, run.call, *leaks[0], of_softmax)]
    if any(reach.before is not None or not reach.there or each.shift == 1 for each, reach in probes):
        return []
    return [_shifted(run.flow, probes[0][0])] if probes else []


def _targets(run: TrainingRun) -> list[Targets]:
    """Inputs that the targets of a classification loss are taken from, each at its shift."""
    assert run.done.loss is not None
    inputs = [(p, t) for p, t in run.call.given if _are_tokens(t)]
    for each in nodes_above(run.done.loss) if inputs else ():
        node: Any = each
        if operation(node) in ("NllLoss", "NllLoss2D"):
            labels, ignored = node._saved_target.detach(), int(node._saved_ignore_index)
            found = [_matched(path, tokens, labels, ignored) for path, tokens in inputs]
            return [targets for targets in found if targets is not None]
    series = [(p, t) for p, t in run.call.given if _is_series(t)]
    for held in regressions(run.done) if series else ():
        found = [_followed(path, values, held.targets) for path, values in series]
        return [targets for targets in found if targets is not None]
    return []


def _is_series(tensor: Tensor) -> bool:
    return tensor.dim() == 3 and tensor.is_floating_point() and min(tensor.shape) > 0


def _followed(path: str, values: Tensor, held: Tensor) -> Targets | None:
    """Targets that are the next values of a series. What is held against the same values may be an autoencoder."""
    if held.dim() != 3:  # one number for a whole series
        return None
    for axis in (1, 0):
        rows, wanted = (t.detach() if axis == 1 else t.detach().transpose(0, 1) for t in (values, held.to(values)))
        times = rows.shape[1]
        if wanted.dim() != 3 or wanted.shape[::2] != rows.shape[::2] or wanted.shape[1] not in (times, times - 1):
            continue
        near = torch.isclose(wanted[:, : times - 1], rows[:, 1:], rtol=1e-4, atol=1e-6).all(2)
        stays = torch.isclose(rows[:, :-1], rows[:, 1:], rtol=1e-4, atol=1e-6).all(2)
        if times > _FEWEST and float(near.double().mean()) >= _MATCH and float(stays.double().mean()) <= _OTHERWISE:
            counted = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
            counted[:, : wanted.shape[1]] = True
            return Targets(values, path, axis, 1, counted)
    return None


def _are_tokens(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.dim() == 2 and whole and min(tensor.shape) > 0 and len(set(tensor.flatten().tolist())) > _FEWEST


def _matched(path: str, tokens: Tensor, labels: Tensor, ignored: int) -> Targets | None:
    labels = labels.to(tokens.device)
    for axis in (1, 0):
        rows = tokens.detach() if axis == 1 else tokens.detach().T
        samples, times = rows.shape
        lengths = {times, times - 1} if labels.dim() == 1 else {labels.shape[-1] if axis == 1 else len(labels)}
        for length in sorted(lengths, reverse=True):
            if labels.numel() != samples * length or length < _FEWEST or length > times:
                continue
            held = labels.reshape(samples, length) if axis == 1 else labels.reshape(length, samples).T
            shares = {shift: _share(rows, held, shift, ignored) for shift in _SHIFTS}
            best = max(shares, key=lambda shift: shares[shift])
            if shares[best] >= _MATCH and all(v <= _OTHERWISE for s, v in shares.items() if s != best):
                counted = torch.zeros_like(rows, dtype=torch.bool)
                counted[:, :length] = (held != ignored) & ~_padding(rows)[:, :length]
                return Targets(tokens, path, axis, best, counted)
    return None


def _padding(rows: Tensor) -> Tensor:
    """Where a row is still the one token that it begins with, again and again: padding in front, which says nothing.

    What such a position returns is of no use, with no key that it may see; often all of them are left to it.
    """
    same = (rows == rows[:, :1]).cumprod(1).bool()
    return same & (same.sum(1, keepdim=True) > 1)


def _share(rows: Tensor, held: Tensor, shift: int, ignored: int) -> float:
    """Share of targets that are the tokens so much further on."""
    length, times = held.shape[1], rows.shape[1]
    first, last = max(0, -shift), min(length, times - shift)
    targets = held[:, first:last]
    counted = targets != ignored
    if last - first < _FEWEST - 1 or int(counted.sum()) < _FEWEST:
        return 0.0
    return float((targets == rows[:, first + shift : last + shift])[counted].double().mean())


class _AlongLast(FunctionCalls):
    """Takes every softmax that is taken along so many positions, and not along the last axis, along that instead.

    Attributes:
        place: the first of them, with its line; empty where there is none.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.place = ""
        self._times = times

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, dim = args[0] if args else None, kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name_of(func) not in _SOFTMAXES or not isinstance(given, Tensor) or not isinstance(dim, int):
            return func(*args, **kwargs)
        last = dim % given.dim() == given.dim() - 1 or given.shape[-1] == 1
        if last or given.shape[dim] != self._times:
            return func(*args, **kwargs)
        line = calling_line()
        self.place = (
            self.place or f"the {name_of(func)} along axis {dim} of {tuple(given.shape)}{f' ({line})' * bool(line)}"
        )
        return given.log_softmax(-1) if "log" in name_of(func) else given.softmax(-1)


def _reach(call: ForwardPass, targets: Targets, mode: FunctionCalls | None = None) -> Reach | None:
    """What the tokens of the second half change, in a mode; None where the output does not depend on them."""
    times = targets.tokens.shape[targets.axis]
    kept = times // 2

    def replaced(tensor: Tensor) -> Tensor:
        if tensor is not targets.tokens:
            return tensor
        later = tensor.narrow(targets.axis, kept, times - kept)
        order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
        drawn = tensor.detach().flatten()[order[: later.numel()].to(tensor.device)].reshape(later.shape)
        return torch.cat([tensor.narrow(targets.axis, 0, kept), drawn], targets.axis)

    plain, moved = ModuleOutputs(call.module), ModuleOutputs(call.module)

    def within(kept: ModuleOutputs) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for each in (kept, mode) if mode is not None else (kept,):
            stack.enter_context(each)
        return stack

    one, two = evaluated(call, mode=lambda _: within(plain)), evaluated(call, replaced, lambda _: within(moved))
    for old, new in zip(float_outputs(one.output), float_outputs(two.output), strict=False):
        changed = _changed(old, new, targets)
        if changed is None or not bool(differing(new, old).any()):
            continue
        there = bool(changed[:, kept].any())
        if not bool(changed[:, :kept].any()):
            return Reach(None, there)
        return Reach(_first(plain, moved, targets, kept), there)
    return None


def _first(plain: ModuleOutputs, moved: ModuleOutputs, targets: Targets, kept: int) -> str:
    """The module that first returns something else for a position before; the one around it if it was given that."""

    def before(one: Tensor | None, other: Tensor | None) -> bool:
        if one is None or other is None:
            return False
        changed = _changed(one, other, targets, torch.ones_like(targets.counted))
        return changed is not None and bool(changed[:, :kept].any())

    for i, ((path, old), (_, new)) in enumerate(zip(plain.made, moved.made, strict=False)):
        if before(old, new):
            return path.rpartition(".")[0] if before(plain.given[i], moved.given[i]) else path
    return ""


def _changed(one: Tensor, other: Tensor, targets: Targets, counted: Tensor | None = None) -> Tensor | None:
    """Of shape (samples, positions), where something differs that counts; None where positions are not to be seen."""
    samples, times = targets.counted.shape
    if one.shape != other.shape:
        return None
    axes = [axis for axis, size in enumerate(one.shape) if size == times]
    if samples == times or len(axes) != 1:
        axes = [targets.axis] if one.dim() == 3 and one.shape[targets.axis] == times else []
    rows = [axis for axis, size in enumerate(one.shape) if size == samples and axis not in axes[:1]]
    if not axes or not rows:
        return None
    differs = differing(other, one).movedim((rows[0], axes[0]), (0, 1)).reshape(samples, times, -1).any(2)
    return differs & (targets.counted if counted is None else counted).to(differs.device)


def _leak(flow: Flow, call: ForwardPass, targets: Targets, path: str | None, softmax: str) -> Finding:
    path = path or ""
    module = dict(call.module.named_modules()).get(path)
    why = ""
    if getattr(module, "bidirectional", False):
        why = ", which reads it in both directions"
    evidence = (
        f"the targets of the loss are what follows in the input {targets.name!r}, and the model sees them: "
        f"with what comes after a position replaced, what it returns for that position and for earlier ones changes, "
        f"first in {path or 'the model'}{why}. It can copy what it is to predict, and will have nothing to copy when "
        "it generates"
    )
    remedy = _hidden(call, path)
    if softmax:
        evidence += f"; tried on a copy: with {softmax} taken along the last axis nothing that comes later is seen"
        remedy = "dim=-1 in that softmax: along positions, what one gains the others lose, those before it as well"
    return _finding(flow, path, "warning", evidence, remedy, targets, OF_SOFTMAX if softmax else "")


_LATER = "torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)"


class _Attends(FunctionCalls):
    """Notes what gives weights to positions, and in which line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (name := name_of(func)) in ("scaled_dot_product_attention", "softmax"):
            self.lines.setdefault(name, calling_line())
        return func(*args, **kwargs)


def _hidden(call: ForwardPass, path: str) -> str:
    """What hides the tokens that come later from the module that was found to read them."""
    model = call.module
    module = dict(model.named_modules()).get(path)
    if isinstance(module, nn.RNNBase):
        return f"read in one direction: bidirectional=False in {path}"
    if isinstance(module, nn.Conv1d):
        return f"pad on the left alone: no padding in {path}, and functional.pad(x, ((kernel_size - 1) * dilation, 0))"
    named = mask_arguments(model, path)
    if named is not None:
        outer, names = named
        return f"mask what comes later: give {outer or 'the model'} {names.causal}={_LATER} (True means masked)"
    watch = _Attends()
    evaluated(call, mode=lambda _: watch)
    if line := watch.lines.get("scaled_dot_product_attention"):
        return f"mask what comes later: is_causal=True in scaled_dot_product_attention ({line})"
    if line := watch.lines.get("softmax"):
        return f"mask what comes later: scores.masked_fill({_LATER}, -torch.inf) before the softmax ({line})"
    return f"let no position read later ones{f' in {path}' if path else ''}"


def _shifted(flow: Flow, targets: Targets) -> Finding:
    what = {0: "the token that it is given there", -1: "the token before, which it has been given"}
    told = what.get(targets.shift, f"the token {targets.shift} positions further on, so that every other is left out")
    evidence = (
        f"no position sees the tokens after it in the input {targets.name!r}, as in a model that predicts the next "
        f"one, and the target of every position is {told}"
    )
    remedy = "the target at t is token t + 1: inputs = tokens[:, :-1], targets = tokens[:, 1:]"
    if targets.shift == 2:
        remedy += "; models of transformers shift the labels themselves, give them labels = input_ids"
    return _finding(flow, "loss", "warning", evidence, remedy, targets)


def _finding(
    flow: Flow, path: str, severity: str, evidence: str, remedy: str, targets: Targets, cause: str = ""
) -> Finding:
    return Finding(
        kind="leak",
        severity=severity,
        steps=(step_of(flow, path) if path != "loss" else len(flow.steps) - 1,),
        module_path=path,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference=_REFERENCE,
        numbers={"shift": float(targets.shift), "targets": float(targets.counted.sum())}
        | ({cause: 1.0} if cause else {}),
    )
