"""What a model returns for a sample must not depend on its place in the batch.

Positions that are counted along the axis of samples do that: a table of times first, added to a batch that has samples
first. In eval mode all samples change places, and their outputs must change places with them, along every axis that
counts samples: the similarities of all samples of two inputs count them twice. Copies of one sample must be returned
alike: where outputs hold samples against each other, only these may differ.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.remedies.moved_weights import moved_weights
from stabkit.diagnosis.states.sample_meetings import differing
from stabkit.diagnosis.states.samples_apart import sample_count
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line

_REFERENCE = "Vaswani et al., Attention is all you need, 2017, section 3.5: positions are those within a sequence"


def batch_place_findings(flow: Flow) -> list[Finding]:
    """A finding where outputs depend on the places of samples in their batch, with where that begins."""
    call = flow.forward_pass
    count = sample_count(call)
    trains = any(module.training for module in call.module.modules())
    if count < 3 or _has_codes(call.module, count) or (flow.batch < 2 and not trains):
        return []  # only where samples are kept apart, as the recording has proven: others may be compared on purpose
    plain = _outputs(evaluated(call).output if trains else flow.output, count)
    if flow.batch < 2 and not _are_apart(call, plain, count):
        return []  # a norm over the batch mixes them in training alone
    if not plain or not _is_of_places(call, plain, count) or not _is_fixed(call, plain, count):
        return []
    first = _first(call, count)
    if first is None:
        return []
    where = " in ".join(part for part in (first.line, first.path) if part)
    begin = f"{first.name}{f' ({where})' if where else ''}"
    evidence = (
        f"what the model returns for a sample depends on its place in the batch of {count}, in eval mode: with the "
        f"samples in another order their outputs are other ones; it begins at {begin}, which makes {first.shape} of "
        "the inputs and of numbers that differ from one sample to the next whatever these are"
    )
    return [
        of_module(
            flow,
            "mixed_samples",
            "warning",
            first.path,
            evidence=evidence,
            remedy=_OF_POSITIONS if first.name in _ADDITIONS else _OF_SAMPLES,
            reference=_REFERENCE,
            numbers={"samples": float(count)},
        )
    ]


_ADDITIONS = frozenset({"add", "mul", "cat", "concat", "addcmul"})  # by which a table of positions comes in
_OF_POSITIONS = (
    "count positions along the axis of the sequence: of (batch, time, features) take a table of shape (1, time, "
    "features), cut to x.size(1) and not to x.size(0)"
)
_OF_SAMPLES = (
    "give the model as an input what differs there from sample to sample (lengths, a row of a table), so that it goes "
    "with the samples wherever they stand; a table of positions is cut to the length of the sequence, x.size(1)"
)


def _has_codes(model: nn.Module, count: int) -> bool:
    """Whether parameters are kept for every sample, as codes that are trained with a decoder are."""
    return any(
        p.dim() > 1 and len(p) == count
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if isinstance(module, nn.Embedding) or not type(module).__module__.startswith("torch.nn")
    )


def _are_apart(call: ForwardPass, plain: Sequence[Tensor], count: int) -> bool:
    """Whether the first and the last sample are returned alike in eval mode where the others change their places."""
    for kept in (0, count - 1):
        rest = [i for i in range(count) if i != kept]
        order = torch.tensor([kept if i == kept else rest[rest.index(i) - 1] for i in range(count)])
        other = _outputs(evaluated(call, functools.partial(_in_order, order)).output, count)
        pairs = zip(plain, other, strict=False)
        if len(other) != len(plain) or any(bool(differing(b[kept], a[kept]).any()) for a, b in pairs):
            return False
    return True


def _in_order(order: Tensor, tensor: Tensor) -> Tensor:
    return tensor[order.to(tensor.device)] if tensor.dim() > 0 and len(tensor) == len(order) else tensor


def _moved(count: int) -> Any:
    return lambda t: t.roll(1, 0) if t.dim() > 0 and len(t) == count else t


def _alike(count: int) -> Any:
    return lambda t: t[:1].expand_as(t) if t.dim() > 0 and len(t) == count else t


def _outputs(output: Any, count: int) -> list[Tensor]:
    made = [t.detach() for _, t in named_tensors(output) if t.is_floating_point()]
    return made if all(t.dim() > 0 and len(t) == count and t.layout == torch.strided for t in made) else []


def _is_of_places(call: ForwardPass, plain: Sequence[Tensor], count: int) -> bool:
    """Whether outputs fail to change places with the samples, and differ where all samples are copies of one."""
    if _follows(plain, _outputs(evaluated(call, _moved(count)).output, count), count):
        return False
    alike = _outputs(evaluated(call, _alike(count)).output, count)
    return not _follows(alike, alike, count)


def _follows(plain: Sequence[Tensor], other: Sequence[Tensor], count: int) -> bool:
    """Whether outputs have changed places as the inputs have; also where that cannot be told."""
    if len(plain) != len(other) or any(a.shape != b.shape for a, b in zip(plain, other, strict=True)):
        return True
    return all(_has_followed(a, b, count) for a, b in zip(plain, other, strict=True))


def _has_followed(one: Tensor, other: Tensor, count: int) -> bool:
    """Whether an output has changed places along its first axis, and along others that count samples.

    Where an axis counts the other samples, with one more or less (negatives behind a positive, all but the diagonal),
    what a sample is returned may come in another order.
    """
    axes = [axis for axis, size in enumerate(one.shape) if size == count and axis]
    every = [(0, *chosen) for n in range(len(axes) + 1) for chosen in itertools.combinations(axes, n)]
    if any(not bool(differing(other, one.roll([1] * len(some), some)).any()) for some in every):
        return True
    if not any(size > 1 and size % count in (0, 1, count - 1) for size in one.shape[1:]):
        return False
    rows, others = (t.reshape(count, -1).sort(1).values for t in (one.roll(1, 0), other))
    return not bool(differing(others, rows).any())


def _is_fixed(call: ForwardPass, plain: Sequence[Tensor], count: int) -> bool:
    """Whether the model draws nothing, and depends on places with all weights moved, too."""
    other = ForwardPass(call.model, call.module, call.inputs, call.kwargs, call.seed + 1)
    again = _outputs(evaluated(other).output, count)
    if len(again) != len(plain) or any(bool(differing(b, a).any()) for a, b in zip(plain, again, strict=True)):
        return False
    try:
        with moved_weights(call.module):
            one = _outputs(evaluated(call).output, count)
            return bool(one) and _is_of_places(call, one, count)
    except StabkitError:
        return False


@dataclass(frozen=True)
class _Made:
    """What one function of a pass returned."""

    name: str
    line: str
    path: str
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape)


class _Noting(FunctionCalls):
    """Keeps what every function returns, and where it is called."""

    def __init__(self, running: Evaluation) -> None:
        super().__init__()
        self.made: list[_Made] = []
        self._running = running

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        tensors = tuple(t.detach().clone() for _, t in named_tensors(out, 3))
        if tensors:
            name = name_of(func)
            self.made.append(_Made(name, calling_line(), self._running.recording.running, tensors))
        return out


def _first(call: ForwardPass, count: int) -> _Made | None:
    """The first function whose result neither stays nor changes places along some axis with the samples."""
    modes: list[_Noting] = []

    def noting(running: Evaluation) -> _Noting:
        modes.append(_Noting(running))
        return modes[-1]

    for change in (None, _moved(count)):
        evaluated(call, change, noting)
    if len(modes) != 2 or [m.name for m in modes[0].made] != [m.name for m in modes[1].made]:
        return None
    for index, (one, two) in enumerate(zip(modes[0].made, modes[1].made, strict=True)):
        if not all(_is_placed(a, b, count) for a, b in zip(one.tensors, two.tensors, strict=True)):
            return one if count in one.shape and not _is_of_pairs(call, count, modes[0].made, index) else None
    return None


def _is_of_pairs(call: ForwardPass, count: int, made: Sequence[_Made], index: int) -> bool:
    """Whether a result has two axes that get shorter with the batch: pairs of samples are ordered on purpose."""
    shape = made[index].shape
    if shape.count(count) < 2:
        return False
    modes: list[_Noting] = []

    def noting(running: Evaluation) -> _Noting:
        modes.append(_Noting(running))
        return modes[-1]

    evaluated(call, lambda t: t[:-1] if t.dim() > 0 and len(t) == count else t, noting)
    if [each.name for each in modes[0].made] != [each.name for each in made]:
        return True  # it cannot be told
    less = modes[0].made[index].shape
    return sum(one == count and other == count - 1 for one, other in zip(shape, less, strict=False)) > 1


def _is_placed(one: Tensor, two: Tensor, count: int) -> bool:
    if one.shape != two.shape or one.layout != torch.strided:
        return False
    if not bool(differing(two, one).any()):
        return True
    axes = [axis for axis, size in enumerate(one.shape) if size == count]
    every = [chosen for n in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, n)]
    return any(not bool(differing(two, one.roll([1] * len(some), some)).any()) for some in every)
