"""What a model returns for a sample must not depend on which other samples are in its batch.

Tried on the function itself, as prediction runs it: in eval mode, all samples but one are replaced by copies of that
one, and its own output must stay. Batch norms with running statistics keep samples apart then. What counts samples is
not known: the first axis of all inputs is taken for it where the first axis of the output follows it, and nothing is
said of graphs, pairs and sets, whose outputs belong to no sample alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Action, Finding, of_module
from stabkit.diagnosis.inputs.padding import is_time_along
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.states.sample_meetings import (
    Comparing,
    Meeting,
    Noting,
    Results,
    differing,
    divides,
    only_arithmetic,
)
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.training_pass import calling_line

_MOST_ROUNDS = 4  # statistics of statistics
_NOTICED = 1e-3  # relative change of an output, from which others matter
_SOFTMAXES = frozenset({"softmax", "log_softmax", "softmin", "gumbel_softmax"})

_NORMS = frozenset({"normalize", "layer_norm", "rms_norm"})
_REFERENCE = "Karpathy, A recipe for training neural networks, 2019: use backprop to chart dependencies"


def mixed_batch_findings(flow: Flow) -> list[Finding]:
    """A finding where samples of a batch influence each other by mistake, with where they meet first."""
    call = flow.forward_pass
    count = sample_count(call)
    if flow.batch > 1 or count < 2:  # kept apart, as the recording has proven
        return []
    probe = _Probe(call, count)
    kept = probe.dependent()
    if kept is None or not probe.follows():
        return []
    met, joined = probe.meetings(kept)
    for judge in (_of_order, _of_scramble, _of_softmax, _of_norm):
        found = judge(probe, met, joined, kept)
        if found is not None:
            return [_finding(flow, probe, met[0], kept, found)]
    return []


def sample_count(call: ForwardPass) -> int:
    """The length of the first axis of all inputs; 0 where they do not agree, as those of a graph do not."""
    given = [t for _, t in call.given if t.dim() > 0]
    if not given or any(t.layout != torch.strided for t in given):
        return 0
    count = len(given[0])
    length = given[0].shape[1] if given[0].dim() > 1 else 0

    def fits(tensor: Tensor) -> bool:
        mask = tuple(tensor.shape) == (length, length) and length != count
        return len(tensor) == count or mask

    graph = any(t.dim() > 1 and t.shape[0] == t.shape[1] == count for t in given[1:])
    return count if all(map(fits, given)) and not graph else 0


@dataclass
class _Probe:
    """A call whose samples are replaced.

    Attributes:
        call: the model and its batch.
        count: how many samples that has.
        moved: relative change of the output of a sample when the others are replaced.
    """

    call: ForwardPass
    count: int
    moved: float = 0.0

    def alike(self, kept: int) -> Callable[[Tensor], Tensor]:
        """Every sample becomes a copy of one."""
        return lambda t: t[kept : kept + 1].expand_as(t) if self._counts(t) else t

    def _counts(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == self.count

    def outputs(self, found: Evaluation) -> list[Tensor]:
        """The outputs whose first axis may count samples."""
        every = [t.detach() for _, t in named_tensors(found.output) if t.is_floating_point() and self._counts(t)]
        return [t for t in every if t.layout == torch.strided]

    def dependent(self) -> int | None:
        """A sample whose output others change; the last is tried first, on which all others act in a recurrence."""
        plain = self.outputs(evaluated(self.call))
        if not plain or not all(bool(t.isfinite().all()) for t in plain):
            return None
        for kept in dict.fromkeys((self.count - 1, 0, self.count // 2)):
            other = self.outputs(evaluated(self.call, self.alike(kept)))
            if len(other) != len(plain) or any(a.shape != b.shape for a, b in zip(plain, other, strict=True)):
                return None
            for one, two in zip(plain, other, strict=True):
                if bool(differing(two, one)[kept].any()):
                    size = float((one[kept] - one.mean(0)).norm()) or float(one[kept].norm()) or 1.0
                    self.moved = float((two[kept] - one[kept]).norm()) / size
                    return kept if self.moved > _NOTICED else None
        return None

    def follows(self) -> bool:
        """Whether the first axis of the output has one entry less when the batch has one sample less, and no other."""
        plain = [t for _, t in named_tensors(evaluated(self.call).output) if t.dim() > 0]
        less = evaluated(self.call, lambda t: t[:-1] if self._counts(t) else t)
        fewer = [t for _, t in named_tensors(less.output) if t.dim() > 0]
        if not fewer or len(fewer) != len(plain):
            return False
        return all(
            tuple(b.shape) in (tuple(a.shape), (self.count - 1, *a.shape[1:]))
            for a, b in zip(plain, fewer, strict=True)
        ) and any(len(b) == self.count - 1 and len(a) == self.count for a, b in zip(plain, fewer, strict=True))

    def meetings(self, kept: int) -> tuple[list[Meeting], list[str]]:
        """Where samples meet, and by what; empty where not all of it is known."""
        results = Results()
        evaluated(self.call, mode=lambda _: Noting(results))
        met: list[Meeting] = []
        joined: list[str] = []
        for _ in range(_MOST_ROUNDS):
            made: list[Comparing] = []
            held = frozenset(meeting.index for meeting in met)

            def comparing(running: Evaluation, made: list[Comparing] = made, held: Any = held) -> FunctionCalls:
                made.append(Comparing(results, kept, self.count, running, held))
                return made[-1]

            evaluated(self.call, self.alike(kept), comparing)
            if not made or made[0].lost:
                return [], []
            new = [meeting for meeting in made[0].met if meeting.index not in held]
            if not new:
                break
            met, joined = [*met, *new], [*joined, *made[0].joined]
        return met, joined

    @property
    def lost_axis(self) -> bool:
        """Whether the output has no entries along the second axis of an input of positions, as one per sample has not.

        What a position is given by may be a vector, or a token.
        """
        first = next(t for _, t in named_tensors([list(self.call.inputs), self.call.kwargs]) if t.dim() > 0)
        outputs = self.outputs(evaluated(self.call))
        dims = first.dim() - first.is_floating_point()
        if dims < 2 or first.shape[1] < 2 or not outputs:
            return False
        return all(t.dim() <= 2 and first.shape[1] not in t.shape[1:] for t in outputs)

    @property
    def is_batch_first(self) -> bool:
        """Whether the second axis is that of positions for certain: one output per sample, or sequences padded so."""
        given = [t for _, t in named_tensors([list(self.call.inputs), self.call.kwargs]) if t.dim() > 1]
        return self.lost_axis or any(is_time_along(t, 1) for t in given)

    def unmixed(self, actions: Sequence[Action] = (), mode: Callable[[], FunctionCalls] | None = None) -> bool:
        """Whether samples are apart with something changed."""
        made = None if mode is None else (lambda _: mode())
        try:
            with carried_out(self.call.module, actions):
                plain = self.outputs(evaluated(self.call, mode=made))
                if not plain:
                    return False
                for kept in dict.fromkeys((self.count - 1, 0)):
                    other = self.outputs(evaluated(self.call, self.alike(kept), made))
                    if len(other) != len(plain) or any(a.shape != b.shape for a, b in zip(plain, other, strict=True)):
                        return False
                    if any(bool(differing(b, a)[kept].any()) for a, b in zip(plain, other, strict=True)):
                        return False
        except StabkitError:
            return False
        return True


@dataclass(frozen=True)
class _Told:
    """What is said of a meeting."""

    evidence: str
    remedy: str
    severity: str = "warning"
    actions: tuple[Action, ...] = ()


def _of_order(probe: _Probe, met: Sequence[Meeting], joined: Sequence[str], kept: int) -> _Told | None:
    """A recurrent layer, or attention, that takes the axis of samples for that of time."""
    modules = dict(probe.call.module.named_modules())
    first = met[0] if met else None
    module = modules.get(first.path) if first is not None else None
    if first is None or not isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return None
    given = first.given
    takes = "(batch, time, features)" if module.batch_first else "(time, batch, features)"
    evidence = f"{first.path} (nn.{type(module).__name__}, batch_first={module.batch_first}) takes {takes}"
    like = [p for p, m in modules.items() if isinstance(m, nn.RNNBase | nn.MultiheadAttention)]
    like = [p for p in like if getattr(modules[p], "batch_first", None) is module.batch_first]
    actions = tuple(remedies.set_option(path, "batch_first", not module.batch_first) for path in like)
    evidence += f" and is given {given}, whose axis {first.axis} counts samples"
    alone = len(given) < 3 or given[1 - first.axis] == 1  # one sequence, or one set, of all that is given
    certain = not alone and probe.is_batch_first and probe.unmixed(actions)
    remedy = f"batch_first={not module.batch_first} at {listed(tuple(like))}, or transpose what is given to it"
    if not certain:
        return _Told(evidence, f"if axis {first.axis} counts samples and not times: {remedy}", "info")
    evidence += f"; tried on a copy: with batch_first={not module.batch_first} no sample depends on another"
    return _Told(evidence, remedy, actions=actions)


def _of_scramble(probe: _Probe, met: Sequence[Meeting], joined: Sequence[str], kept: int) -> _Told | None:
    """A reshape where a transposition is meant."""
    first = next((meeting for meeting in met if meeting.kind == "scramble"), None)
    if first is None:
        return None
    for axis, size in enumerate(first.made):
        if size == probe.count and axis != first.axis and probe.unmixed(mode=functools.partial(_Moving, first, axis)):
            swap = f"transpose({first.axis}, {axis})"
            evidence = (
                f"{_called(first)} makes {first.made} of {first.given}, of which axis {first.axis} counts samples, "
                f"entry by entry in their order in memory, so that each row holds parts of several samples; tried on "
                f"a copy: with {swap} before it no sample depends on another"
            )
            return _Told(evidence, f"{swap}, or permute, before {first.name} where axes are to change places")
    return None


def _of_softmax(probe: _Probe, met: Sequence[Meeting], joined: Sequence[str], kept: int) -> _Told | None:
    """A softmax over samples."""
    found = [meeting for meeting in met if meeting.name in _SOFTMAXES]
    if not found or len(found) < len(met):
        return None
    first = found[0]
    wide = [axis - len(first.given) for axis, size in enumerate(first.given) if size > 1 and axis != first.axis]
    if not wide or not (probe.lost_axis or _are_classes(probe, first)):
        return None
    if not probe.unmixed(mode=functools.partial(_Along, first, wide[-1])):
        return None
    evidence = (
        f"{_called(first)} is taken along axis {first.axis} of {first.given}, which counts samples: the weights of one "
        f"sample sink when those of another rise; tried on a copy: along axis {wide[-1]} no sample depends on another"
    )
    return _Told(evidence, f"dim={wide[-1]} in that softmax (without dim, 0 is taken of three axes)")


def _are_classes(probe: _Probe, first: Meeting) -> bool:
    """Whether what a softmax gives is the output itself: scores of classes beside each other in every row."""
    outputs = probe.outputs(evaluated(probe.call))
    positive = any(bool((t >= 0).all()) for t in outputs) or first.name == "log_softmax"
    return positive and any(tuple(t.shape) == first.made and t.dim() == 2 for t in outputs)


def _of_norm(probe: _Probe, met: Sequence[Meeting], joined: Sequence[str], kept: int) -> _Told | None:
    """A norm over the batch that keeps no running statistics."""
    known = [meeting for meeting in met if meeting.kind == "statistic" or meeting.name in _NORMS]
    if not known or len(known) < len(met) or (joined and not only_arithmetic(joined)):
        return None
    first = known[0]
    if first.name not in _NORMS and not divides(joined):
        return None  # what is added to every element of a set, or taken from it, may be meant
    alone = evaluated(probe.call, lambda t: t[kept : kept + 1] if t.dim() > 0 and len(t) == probe.count else t)
    single = [t for _, t in named_tensors(alone.output) if t.is_floating_point()]
    broken = bool(single) and not all(bool(t.isfinite().all()) for t in single)
    names = listed(tuple(dict.fromkeys(meeting.name for meeting in known)))
    evidence = (
        f"{_called(first)} normalises {first.given} by {names} over axis {first.axis}, which counts samples, and keeps "
        "no running statistics: what it returns for a sample changes with its batch, also in eval mode"
    )
    if broken:
        evidence += "; a sample by itself gives numbers that are not finite"
    return _Told(
        evidence,
        "take it over the features of each sample (dim=-1, keepdim=True); or use a batch norm, which keeps running "
        "statistics for prediction; data are standardised where they are read, with the numbers of the training set",
    )


def _called(meeting: Meeting) -> str:
    where = " in ".join(part for part in (meeting.line, meeting.path) if part)
    return f"{meeting.name}{f' ({where})' if where else ''}"


class _Along(FunctionCalls):
    """Takes the softmax of one line, or module, along another axis."""

    def __init__(self, meeting: Meeting, dim: int) -> None:
        super().__init__()
        self._meeting, self._dim = meeting, dim

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") == self._meeting.name and calling_line() == self._meeting.line:
            by_place = len(args) > 1  # where the axis is the second argument; functions of nn.functional name theirs
            args = (args[0], self._dim, *args[2:]) if by_place else args
            kwargs = kwargs if by_place else {**kwargs, "dim": self._dim}
        return func(*args, **kwargs)


class _Moving(FunctionCalls):
    """Moves the axis of samples before the reshape of one line."""

    def __init__(self, meeting: Meeting, axis: int) -> None:
        super().__init__()
        self._meeting, self._axis = meeting, axis

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here = getattr(func, "__name__", "") == self._meeting.name and calling_line() == self._meeting.line
        if here and isinstance(args[0], Tensor) and tuple(args[0].shape) == self._meeting.given:
            args = (args[0].transpose(self._meeting.axis, self._axis).contiguous(), *args[1:])
        return func(*args, **kwargs)


def _finding(flow: Flow, probe: _Probe, first: Meeting, kept: int, told: _Told) -> Finding:
    evidence = (
        f"what the model returns for a sample depends on the others in its batch of {probe.count}: with those replaced "
        f"by copies of it, it moves by {min(probe.moved, 99.99):.0%} of what tells it from their mean; {told.evidence}"
    )
    return of_module(
        flow,
        "mixed_samples",
        told.severity,
        first.path,
        evidence=evidence,
        remedy=told.remedy,
        reference=_REFERENCE,
        numbers={"moved": probe.moved, "samples": float(probe.count), "sample": float(kept)},
        actions=told.actions,
    )
