"""Outputs that are read at a position which has seen few of the others: the first step of a recurrence, and its like.

What a recurrence, or attention under a causal mask, returns at a position depends on what came up to there. Read at the
wrong end, a model is given whole sequences and answers by one token of each. The backward half of a bidirectional
recurrence has seen one token at the last position. Inputs are exchanged to see what matters; the line that reads is run
with another position, and training says what that is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.remedies.applying import is_small
from stabkit.diagnosis.remedies.held_out import learnt
from stabkit.diagnosis.remedies.moved_weights import moved_weights
from stabkit.diagnosis.remedies.other_arguments import Arguments, OtherArguments
from stabkit.diagnosis.remedies.usual_training import ADAM, RATES, adam, learns_only_treated, left_after
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import TrainingPass, calling_line

_FEWEST = 4  # positions that a sequence has at least
_ROUNDING = 1e-6  # of the largest entry of an output: what another order of additions may do
_STEPS = 50  # of a trial, and a fifth of that for large models
_MORE = 2  # times as many positions that another reading must depend on
# single tokens of 64 sequences are learnt by heart to .35 to .5 of the loss, whole ones to .001 to .01; where the first
# token is what matters, it leaves .06 and the whole sequence .2
_TIMES, _GAIN = 3.0, 0.2
_READS = ("getitem", "select")
_REFERENCE = "https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html: outputs, output and h_n"

Within = Callable[[], AbstractContextManager[Any]]


def read_position_findings(run: TrainingRun) -> list[Finding]:
    """A finding where another position than the one that is read has seen more of every sequence."""
    for axis in (1, 0):
        sequences = _Sequences.of(run.call, run.done, axis)
        if sequences is None:
            continue
        reads = _Reading.of(run.call, sequences)
        if not reads:
            continue
        half = sequences.positions // 2
        for end in (0, -1):
            if not sequences.same(half, end):
                continue
            return _of_few(run, sequences, end, reads)
        return _of_halves(run, sequences, reads)
    return []


@dataclass(frozen=True)
class _Sequences:
    """What a model is given.

    Attributes:
        call: the pass as training makes it.
        lead: the first two sizes of what holds the sequences.
        axis: the one of both that counts positions; the other counts samples.
    """

    call: ForwardPass
    lead: tuple[int, int]
    axis: int

    @classmethod
    def of(cls, call: ForwardPass, done: TrainingPass, axis: int) -> _Sequences | None:
        """Sequences of tokens, or of vectors, of which each has one output; None for other calls."""
        first = next((t for _, t in call.given if t.dim() > 0), None)
        if first is None or first.dim() != 2 + first.is_floating_point() or first.layout != torch.strided:
            return None
        found = cls(call, (first.shape[0], first.shape[1]), axis)
        outputs = _outputs(done.output)
        if (
            found.count < 2
            or found.positions < _FEWEST
            or not outputs
            or (axis == 0 and found.count == found.positions)
        ):
            return None
        fits = all(t.dim() > 0 and len(t) == found.count and found.positions not in t.shape[1:] for t in outputs)
        return found if fits and bool((first.roll(1, 1 - axis) != first).any()) else None

    @property
    def positions(self) -> int:
        """How many positions each has."""
        return self.lead[self.axis]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return self.lead[1 - self.axis]

    def same(self, kept: int, end: int) -> bool:
        """Whether outputs stay when every sample gets what the next one has, but for some positions at one end.

        So it must be at other weights too: what starts at zero may let them matter after a step.
        """
        try:
            with moved_weights(self.call.module):
                moved = self._same(kept, end, nullcontext)
        except StabkitError:
            return False
        return moved and self._same(kept, end, nullcontext)

    def _same(self, kept: int, end: int, within: Within) -> bool:
        places = torch.arange(self.positions)
        others = places >= kept if end == 0 else places < self.positions - kept

        def change(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape[:2]) != self.lead or bool(((tensor == 0) | (tensor == 1)).all()):
                return tensor  # a mask
            shape = [-1 if i == self.axis else 1 for i in range(tensor.dim())]
            return torch.where(others.to(tensor.device).reshape(shape), tensor.roll(1, 1 - self.axis), tensor)

        def mode(_: Evaluation) -> AbstractContextManager[Any]:
            return within()

        one, two = (_outputs(evaluated(self.call, each, mode).output) for each in (None, change))
        if not one or [t.shape for t in one] != [t.shape for t in two]:
            return False
        return all(
            float((a - b).abs().max()) <= _ROUNDING * float(a.abs().max()) for a, b in zip(one, two, strict=True)
        )

    def seen(self, end: int, within: Within = nullcontext) -> int:
        """The fewest positions at an end that outputs depend on, and on no other."""
        low, high = 0, self.positions
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._same(middle, end, within) else (middle + 1, high)
        return low


@dataclass(frozen=True)
class _Reading:
    """A line of code that takes one position out of states of all of them.

    Attributes:
        line: file and line.
        path: the module that runs it.
        shape: of what it is given.
        axis: along which it takes one position.
        index: which, from 0.
        halves: the module whose two directions it is given, if any.
    """

    line: str
    path: str
    shape: tuple[int, ...]
    axis: int
    index: int
    halves: str = ""

    @classmethod
    def of(cls, call: ForwardPass, sequences: _Sequences) -> list[_Reading]:
        """Those of a pass which one line makes once."""
        made: list[_Noting] = []

        def noting(running: Evaluation) -> FunctionCalls:
            made.append(_Noting(call.module, running, sequences))
            return made[-1]

        evaluated(call, mode=noting)
        lines = [read.line for read in made[0].found]
        return [read for read in made[0].found if lines.count(read.line) == 1]

    @property
    def last(self) -> bool:
        """Whether it takes the last one."""
        return self.index == self.shape[self.axis] - 1

    def at(self, index: int) -> Within:
        """Makes what runs the line with another position."""
        return lambda: OtherArguments(_READS, self.line, lambda _, args, kwargs: (self._moved(args, index), kwargs))

    def turned(self) -> Within:
        """Makes what runs the line with the two directions at the positions where each has seen all."""
        return lambda: OtherArguments(_READS, self.line, lambda _, args, kwargs: (self._turned(args), kwargs))

    def _fits(self, args: Arguments) -> bool:
        return isinstance(args[0], Tensor) and tuple(args[0].shape) == self.shape

    def _moved(self, args: Arguments, index: int) -> Arguments:
        if not self._fits(args):
            return args
        if len(args) == 3:  # select
            return (args[0], args[1], index % self.shape[self.axis])
        key = list(_indices(args[0], args[1]))
        place = index % self.shape[self.axis]
        key[self.axis] = slice(place, place + 1) if isinstance(key[self.axis], slice) else place
        return (args[0], tuple(key))

    def _turned(self, args: Arguments) -> Arguments:
        if not self._fits(args):
            return args
        forward, backward = args[0].chunk(2, -1)
        halves = (forward, backward.flip(self.axis)) if self.last else (forward.flip(self.axis), backward)
        return (torch.cat(halves, -1), *args[1:])


class _Noting(FunctionCalls):
    """Notes where one position is read out of states."""

    def __init__(self, module: nn.Module, running: Evaluation, sequences: _Sequences) -> None:
        super().__init__()
        self.found: list[_Reading] = []
        self._running, self._sequences = running, sequences
        self._modules = dict(module.named_modules())
        self._directions: dict[int, str] = {}
        self._alive: list[Tensor] = []

    def _called(self, func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name, path = name_of(func), self._running.recording.running
        module = self._modules.get(path)
        if isinstance(module, nn.RNNBase) and module.bidirectional:
            wide = [t for _, t in named_tensors(out, 3) if t.dim() == 3]
            self._directions |= {id(t): path for t in wide}
            self._alive += wide  # ids stay theirs
        elif name in _READS and len(args) > 1 and isinstance(args[0], Tensor):
            self._note(args[0], args, path)
        return out

    def _note(self, tensor: Tensor, args: Arguments, path: str) -> None:
        """Keep a reading along an axis of about as many entries as there are positions, beside one of samples."""
        if tensor.dim() < 3 or not tensor.is_floating_point():
            return
        keys = _indices(tensor, args[1]) if len(args) == 2 else ()
        if len(args) == 3 and isinstance(args[1], int) and isinstance(args[2], int):
            keys = tuple(args[2] if i == args[1] % tensor.dim() else slice(None) for i in range(tensor.dim()))
        for axis, key in enumerate(keys):
            size = tensor.shape[axis]
            place = _place(key, size)
            others = [s for i, s in enumerate(tensor.shape) if i != axis]
            if place is None or 2 * size < self._sequences.positions or self._sequences.count not in others:
                continue
            halves = self._directions.get(id(tensor), "")
            self.found.append(_Reading(calling_line(), path, tuple(tensor.shape), axis, place, halves))
            return


def _indices(tensor: Tensor, key: Any) -> tuple[Any, ...]:
    """What is taken along each axis; empty where it is no matter of integers and slices."""
    keys = key if isinstance(key, tuple) else (key,)
    if not all(k is Ellipsis or (isinstance(k, int | slice) and not isinstance(k, bool)) for k in keys):
        return ()
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    before, after = keys[:at], keys[at + 1 :]
    return (*before, *[slice(None)] * (tensor.dim() - len(before) - len(after)), *after)


def _place(key: Any, size: int) -> int | None:
    """The one position that an index or a slice takes of so many."""
    if isinstance(key, int):
        return key % size if size else None
    taken = range(size)[key]
    return taken[0] if len(taken) == 1 < size else None


def _of_few(
    run: TrainingRun,
    sequences: _Sequences,
    end: int,
    reads: list[_Reading],
) -> list[Finding]:
    """Outputs that depend on at most half of the positions, and would depend on more if read at the other end."""
    count, other = sequences.seen(end), -1 - end
    for read in reads:
        moved = read.at(other)
        if read.index == other % read.shape[read.axis]:
            continue
        more = sequences.seen(other, moved)
        if more <= _MORE * count + 1:  # windows are as wide anywhere
            continue
        which = f"the {'first' if end == 0 else 'last'} {count} of" if count else "none of"
        evidence = (
            f"what is returned depends on {which} {sequences.positions} positions: the others may be exchanged among "
            f"the samples and the output stays. {read.line} reads position {read.index} of {read.shape}, which has "
            f"seen no more; read at {other} it depends on the {'last' if end == 0 else 'first'} {more}"
        )
        remedy = (
            f"read the {'last' if end == 0 else 'first'} position there (index {other}, or the last real one of padded "
            "sequences; of a recurrence, the last state), or the mean over positions"
        )
        if count == 0:
            remedy += "; or take the causal mask away, so that a first token sees the others"
        return [_judged(run, read, moved, evidence, remedy, f"position {other}", _TIMES)]
    return []


def _of_halves(run: TrainingRun, sequences: _Sequences, reads: list[_Reading]) -> list[Finding]:
    """The two directions of a recurrence read at one end, where one of them has seen a single position."""
    for read in reads:
        if not read.halves or not (read.last or read.index == 0) or read.shape[-1] % 2:
            continue
        one, all_ = ("backward", "forward") if read.last else ("forward", "backward")
        evidence = (
            f"{read.line} reads position {read.index} of both directions of {read.halves}: the {one} one has seen a "
            f"single one of {sequences.positions} positions there, the {all_} one all"
        )
        remedy = (
            "take the last state of each direction, torch.cat([h_n[-2], h_n[-1]], -1), or out[:, -1, :H] beside "
            "out[:, 0, H:]; or the mean over positions"
        )
        return [_judged(run, read, read.turned(), evidence, remedy, "each where it has seen all", 0.0)]
    return []


def _judged(
    run: TrainingRun,
    read: _Reading,
    within: Within,
    evidence: str,
    remedy: str,
    where: str,
    times: float,
) -> Finding:
    """A warning where training learns with the other reading what it does not as it is, a fact otherwise.

    As much lower counts as well, where a number of ``times`` is given: a batch is learnt by heart from one token too.
    """
    steps = (
        _STEPS if is_small(run.call.module) and times > 0 else _STEPS // 5
    )  # a direction that is lost is seldom of matter
    rates = [adam(rate) for rate in RATES]
    plain, treated = (
        left_after(run.call, run.loss, rates, steps=steps),
        left_after(run.call, run.loss, rates, steps=steps, within=within),
    )
    better = False
    if run.done.loss is not None and plain is not None and treated is not None:
        first = float(run.done.loss.detach())
        better = first > 0 and learns_only_treated(first, plain * first, treated * first)
        better = better or (first > 0 and treated * times < plain - _GAIN and times > 0)
        evidence += (
            f"; {steps} steps of {ADAM} take the loss from {first:.3g} to {plain * first:.3g} as it is, to "
            f"{treated * first:.3g} reading {where}"
        )
    if not better and times > 0:
        ones, others = learnt(run.call, run.loss, steps), learnt(run.call, run.loss, steps, within=within)
        if ones is not None and others is not None and others.beats(ones):
            better = True
            evidence += (
                f"; of samples that are held out {max(ones.other, 0.0):.0%} of the loss is learnt as it is, "
                f"{others.other:.0%} so"
            )
    return of_module(
        run.flow,
        "no_influence",
        "warning" if better else "info",
        read.halves or read.path,
        evidence=evidence,
        remedy=remedy if better else f"none is needed where the others are of no matter; otherwise {remedy}",
        reference=_REFERENCE,
        numbers={"position": float(read.index), "positions": float(read.shape[read.axis])},
    )


def _outputs(output: Any) -> list[Tensor]:
    return [t.detach().double() for _, t in named_tensors(output) if t.is_floating_point() and t.numel()]
