"""Reshapes that cut through axes where these are to change places: ``view(B, heads, T, d)`` of ``(B, T, heads * d)``.

A reshape keeps entries in their order in memory. Where it makes the shape that a transposition would make, but neither
merges nor splits whole axes, rows hold parts of several positions or channels. Some models do that on purpose, so the
transposition is tried: what training on half of a batch does for the other half says which of the two was meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding, of_module, serious
from stabkit.diagnosis.remedies.applying import is_small
from stabkit.diagnosis.remedies.held_out import Learnt, learnt
from stabkit.diagnosis.remedies.usual_training import ADAM
from stabkit.diagnosis.states.sample_meetings import differing
from stabkit.diagnosis.states.samples_apart import sample_count
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.training_pass import Observer, calling_line, training_pass

_RESHAPES = frozenset({"view", "reshape"})
_STEPS = 60  # of every trial, and a third of that for large models
_MOST_LINES = 3  # that are tried each by itself
_MOST_AXES = 5  # of what is reshaped, but for axes that stay
_REFERENCE = "Karpathy, A recipe for training neural networks, 2019: view in place of transpose mixes what is apart"


@dataclass(frozen=True)
class Turn:
    """What a reshape was meant to be, perhaps: one axis moved before it.

    Attributes:
        split: the shape that it is read as first; the same where no axis is split.
        order: of the axes of that, as for ``permute``.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]

    def words(self, given: tuple[int, ...], made: tuple[int, ...]) -> str:
        """As it is written in code."""
        moved = [i for i, axis in enumerate(self.order) if i != axis]
        first, last = moved[0], moved[-1]
        swap = len(moved) == 2
        turned = f"transpose({first}, {last})" if swap else f"permute{self.order}"
        if self.split == given:
            return f"{turned} before it"
        after = "" if tuple(self.split[axis] for axis in self.order) == made else f".reshape{made}"
        return f"view{self.split}.{turned}{after} in its place"


def turn_of(given: Sequence[int], made: Sequence[int], count: int = 0) -> Turn | None:
    """The single move of an axis that gives the same shape as a reshape that cuts through axes; None where none does.

    Args:
        given: shape before the reshape.
        made: shape after it.
        count: of samples; axes that are merged with that of samples behind another are in another order, too.

    Example:
        >>> turn_of((2, 12, 32), (2, 4, 12, 8))  # heads
        Turn(split=(2, 12, 4, 8), order=(0, 2, 1, 3))
        >>> turn_of((2, 12, 32), (2, 12, 4, 8)), turn_of((2, 3, 4, 4), (2, 48))
        (None, None)
    """
    given, made = tuple(given), tuple(made)
    if 0 in given or math.prod(given) != math.prod(made):
        return None
    if not _cuts(given, made):
        return _of_samples(given, made, count)
    lead = next((i for i, (a, b) in enumerate(zip(given, made, strict=False)) if a != b), 0)
    if len(given) - lead > _MOST_AXES:
        return None
    for split in (given, *_splits(given, made, lead)):
        for order in _moves(len(split), lead):
            moved = tuple(split[axis] for axis in order)
            if moved != split and _is_whole(moved, made):
                return Turn(split, order)
    return None


def _of_samples(given: tuple[int, ...], made: tuple[int, ...], count: int) -> Turn | None:
    """Rows of (times, samples) in a row, which targets of (samples, times) are not."""
    if len(given) < 3 or count < 2 or given[1] != count or given[0] in (1, count) or made[0] != given[0] * count:
        return None
    return Turn(given, (1, 0, *range(2, len(given))))


def _splits(given: tuple[int, ...], made: tuple[int, ...], lead: int) -> Iterator[tuple[int, ...]]:
    """The shape with one of its axes in two, one of which is an axis of the result."""
    for axis in range(len(given) - 1, lead - 1, -1):
        for size in reversed(made[lead:]):
            if 1 < size < given[axis] and given[axis] % size == 0:
                yield (*given[:axis], given[axis] // size, size, *given[axis + 1 :])


def _moves(count: int, lead: int) -> Iterator[tuple[int, ...]]:
    """Orders in which one axis stands elsewhere, the nearest first; those that lead stay."""
    pairs = [(i, j) for i in range(lead, count) for j in range(lead, count) if i != j]
    for i, j in sorted(pairs, key=lambda pair: (abs(pair[0] - pair[1]), pair)):
        order = [axis for axis in range(count) if axis != i]
        order.insert(j, i)
        yield tuple(order)


def _cuts(given: Sequence[int], made: Sequence[int]) -> bool:
    """Whether a reshape cuts through axes of which one has the size of a new one, so that a move may be meant.

    Frames that are stacked and heads that join the batch cut an axis too, and leave none of the sizes.
    """
    return any(min(len(old), len(new)) > 1 and set(old) & set(new) for old, new in _groups(given, made))


def _is_whole(given: Sequence[int], made: Sequence[int]) -> bool:
    """Whether a reshape merges whole axes and splits whole axes, and nothing else."""
    return all(min(len(old), len(new)) <= 1 for old, new in _groups(given, made))


def _groups(given: Sequence[int], made: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Neighbouring axes, but for those of one entry, that hold what as few neighbouring axes of the result hold."""
    before, after = ([size for size in shape if size != 1] for shape in (given, made))
    while before and after:
        old, new = [before.pop(0)], [after.pop(0)]
        while math.prod(old) != math.prod(new):
            short, rest = (old, before) if math.prod(old) < math.prod(new) else (new, after)
            short.append(rest.pop(0))
        yield old, new


@dataclass(frozen=True)
class _Cut:
    """A reshape that cuts.

    Attributes:
        name: of the function.
        line: that calls it.
        path: the module that runs it.
        given: shape before.
        made: shape after.
        turn: what it was meant to be, perhaps.
    """

    name: str
    line: str
    path: str
    given: tuple[int, ...]
    made: tuple[int, ...]
    turn: Turn


class _Reshapes(FunctionCalls):
    """Sees the reshapes that lines of the user call; those of some lines are done as they were meant.

    Args:
        count: of samples.
        turned: lines whose reshapes are turned.
        observer: says which module runs.
    """

    def __init__(self, count: int, turned: Sequence[str] = (), observer: Observer | None = None) -> None:
        super().__init__()
        self.cuts: dict[_Cut, None] = {}
        self.count, self.turned, self.observer = count, turned, observer

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name, given = getattr(func, "__name__", ""), args[0] if args else None
        if name not in _RESHAPES or not isinstance(given, Tensor) or not given.is_floating_point():
            return out
        turn = turn_of(given.shape, out.shape, self.count) if given.shape != out.shape else None
        line = calling_line() if turn is not None else ""
        if turn is None or not line:
            return out
        self.cuts[_Cut(name, line, self._running(), tuple(given.shape), tuple(out.shape), turn)] = None
        if line not in self.turned:
            return out
        return given.reshape(turn.split).permute(turn.order).reshape(out.shape)

    def _running(self) -> str:
        return "" if self.observer is None else self.observer.recording.running


def cut_axes_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where a reshape cuts through axes, and training is better with a transposition in its place.

    Samples that a reshape mixes are told already.
    """
    count = sample_count(run.call)
    if count < 4 or any(finding.kind == "mixed_samples" and serious(finding) for finding in others):
        return []
    seen = _Reshapes(count)
    observer = seen.observer = Observer(seen)
    try:
        training_pass(run.call, run.loss, observer, differentiate=False)
    except (StabkitError, RuntimeError):
        return []
    cuts = list(seen.cuts)
    lines = tuple(dict.fromkeys(cut.line for cut in cuts))
    if not lines:
        return []
    steps = _STEPS if is_small(run.call.module) else _STEPS // 3
    plain = learnt(run.call, run.loss, steps)
    if plain is None:
        return []
    best, shorter = plain, _seen_less(run.call, count, lines)
    alone = [(line,) for line in lines[:_MOST_LINES]] if len(lines) > 1 and not shorter else []
    for some in (lines, *alone):
        treated = learnt(run.call, run.loss, steps, within=lambda some=some: _Reshapes(count, some))  # type: ignore[misc]
        if treated is not None and treated.beats(plain):
            return [_finding(run.flow, [cut for cut in cuts if cut.line in some], plain, treated, steps, seen=shorter)]
        best = max(best, treated or plain, key=lambda found: found.other)
    through = [cut for cut in cuts if _cuts(cut.given, cut.made)]
    if not through:
        return []
    return [_finding(run.flow, through, plain, best, steps, "warning" if shorter else "info", shorter)]


def _seen_less(call: ForwardPass, count: int, lines: Sequence[str]) -> str:
    """In words, how many positions see what stands at another, where turned reshapes let far more see it."""
    seen = [_positions_moved(call, mode) for mode in (None, lambda _: _Reshapes(count, lines))]
    if not seen[0] < seen[1] or 2 * len(seen[0]) > len(seen[1]):
        return ""
    ones, others = (sum(place == 0 for place, _ in found) for found in seen)
    return (
        f"; what stands at the first position changes the output at {ones} positions, with a transposition at {others}"
    )


def _positions_moved(call: ForwardPass, mode: Any) -> frozenset[tuple[int, int]]:
    """Pairs of a position whose input is exchanged among the samples, and a position whose output changes with it."""
    first = next((t for _, t in call.given if t.dim() > 1), None)
    if first is None or first.shape[1] < 2:
        return frozenset()
    length, moved = first.shape[1], set[tuple[int, int]]()
    plain = evaluated(call, mode=mode).output
    for place in (0, length // 2, length - 1):

        def exchanged(tensor: Tensor, place: int = place) -> Tensor:
            if tensor is not first:
                return tensor
            return tensor.index_copy(1, torch.tensor([place], device=tensor.device), tensor[:, [place]].roll(1, 0))

        other = evaluated(call, exchanged, mode).output
        if not isinstance(plain, Tensor) or not isinstance(other, Tensor) or plain.dim() < 2:
            return frozenset()
        if plain.shape[:2] != first.shape[:2] or plain.shape != other.shape:
            return frozenset()
        differs = differing(other, plain).transpose(0, 1).flatten(1).any(1)
        moved |= {(place, int(i)) for i in differs.nonzero().flatten()}
    return frozenset(moved)


def _finding(
    flow: Flow,
    cuts: Sequence[_Cut],
    plain: Learnt,
    treated: Learnt,
    steps: int,
    severity: str = "warning",
    seen: str = "",
) -> Finding:
    first = cuts[0]
    where = " in ".join(part for part in (first.line, first.path) if part)
    rest = tuple(dict.fromkeys(f"{cut.name} ({cut.line})" for cut in cuts if cut.line != first.line))
    what = (
        "one time of all samples after another, where samples come first in what the model is given"
        if not _cuts(first.given, first.made)
        else "entry by entry in their order in memory, so that what lies along one axis is cut and mixed with another"
    )
    evidence = (
        f"{first.name} ({where}) makes {first.made} of {first.given}, {what}"
        + (f"; so does {' and '.join(rest)}" if rest else "")
        + seen
    )
    how = first.turn.words(first.given, first.made)
    if not seen or treated.beats(plain):
        evidence += (
            f"; tried on a copy: with {how}, up to {steps} steps of {ADAM} on half of the batch take "
            f"{max(treated.other, 0):.0%} of the loss of the other half away, as it is {max(plain.other, 0):.0%}"
        )
    return of_module(
        flow,
        "axes",
        severity,
        first.path,
        evidence=evidence,
        remedy=("" if severity == "warning" else "where axes are to change places: ")
        + f"{how}; a reshape moves no axis",
        reference=_REFERENCE,
        numbers={"learnt": plain.other, "learnt_turned": treated.other},
    )
