"""Spikes and drifts in what a monitor records, and the block that moved first."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np

from stabkit.diagnosis import Finding
from stabkit.monitor.first_block import Mover, first_mover, moved_finding, non_finite_finding
from stabkit.monitor.harm import Harm
from stabkit.monitor.record import Array, Blocks, Record
from stabkit.monitor.rules import AlertRules
from stabkit.monitor.scaling import AT_START
from stabkit.monitor.series import Move, SeriesBank

_FIELDS = ("growth", "gain", "total")
_SEEN = math.log(2.0)  # of a gain: weights that jumped are seen in the forward pass as well


class Alerts:
    """Turns records into findings, with the words and the kinds of ``diagnose``.

    Args:
        rules: when a change is an alert.
        scaled: whether a loss scaler is at work, which runs into infinities on purpose.

    Attributes:
        broken: whether it has been told that something is not finite, and still is.
        first: what moved first in this episode.
    """

    def __init__(self, rules: AlertRules | None = None, *, scaled: bool = False) -> None:
        self.rules = rules or AlertRules()
        self._scaled = scaled
        self._names: tuple[str, ...] = ()
        self._bank: SeriesBank | None = None
        self._overflows = 0
        self.broken = self._worked = False
        self._quiet = 0
        self._before = 0
        self._largest = -math.inf  # log of the largest gradient norm that was no spike
        self._harm = Harm(self.rules.warmup)
        self._gains: deque[Array] = deque(maxlen=2)
        self._most: Array | None = None  # calls of each block in a record
        self._said: set[tuple[str, str]] = set()  # in this episode
        self.first: Mover | None = None

    def began(self, step: int) -> int:
        """The step at which something moved first in this episode; the present one where nothing has."""
        return step if self.first is None else self.first.step

    def judge(self, record: Record) -> list[Finding]:
        """The findings that this record gives rise to; a condition that persists is reported once."""
        if record.non_finite:
            return self._judge_non_finite(record)
        self.broken, self._overflows, self._worked = False, 0, True
        movers = self._movers(record)
        if not movers:
            self._quiet += 1
            if self._quiet >= self.rules.warmup:
                self.first = None
                self._said.clear()
            return []
        self._quiet = 0
        leader = first_mover(movers)
        self.first = self.first or leader
        kinds: dict[str, list[Mover]] = {}
        for mover in movers:
            if mover.fresh:
                kinds.setdefault(mover.kind, []).append(mover)
        findings = [
            moved_finding(leader if leader in alike else first_mover(alike), alike, self.first)
            for alike in kinds.values()
        ]
        # one block may move in several quantities, some of them a record later
        news = [finding for finding in findings if (finding.kind, finding.module_path) not in self._said]
        self._said.update((finding.kind, finding.module_path) for finding in findings)
        return sorted(news, key=lambda finding: finding.module_path != leader.name)

    def _judge_non_finite(self, record: Record) -> list[Finding]:
        self._overflows += 1
        mendable = self._scaled and not record.blocks.bad[0].any() and not record.loss_is_broken
        if self.broken or (mendable and self._overflows < (self.rules.overflows if self._worked else AT_START)):
            return []
        self.broken, self._quiet = True, 0
        finding = non_finite_finding(record, self.first)
        if mendable:
            tried = f"{finding.evidence}; the loss scale was lowered at {self._overflows} records in a row, in vain"
            finding = replace(finding, evidence=tried)
        index = finding.steps[0] if finding.steps else -1
        broken = Move(-1, "spike", math.inf, 0.0, math.inf, True)
        began = Mover(**vars(broken), step=record.step, name=finding.module_path, index=index, field="non_finite")
        self.first = self.first or began
        return [finding]

    def _movers(self, record: Record) -> list[Mover]:
        """The blocks that moved, in the order of the forward pass; the model as a whole comes last."""
        names, blocks = record.blocks.names, record.blocks
        if self._bank is None:
            self._names = names
            jumps = np.full(2 * len(names) + 1, self.rules.jump)
            jumps[-1] = self.rules.total_jump
            certain = np.zeros(len(jumps))
            certain[: len(names)] = self.rules.certain
            self._bank = SeriesBank(self.rules, jumps, certain, drifting=2 * len(names))
        places = self._places(names)
        total = math.log(record.gradient_norm) if record.gradient_norm > 0 else math.nan
        growth, gain = self._compared(blocks, places)
        values = np.concatenate([growth, gain, [total]])
        found = []
        jumped = [np.abs(gain - before) for before in self._gains]
        self._gains.append(gain)
        moves = self._bank.add(values)
        self._harm.see(record.loss, total)
        for move in moves:
            field, block = divmod(move.series, len(self._names))
            if _FIELDS[field] == "total" and move.value < self._largest + self.rules.total_jump:
                # a small gradient of everything is how training ends; where the data change after it has ended, or a
                # full batch is at the edge of stability, it is for a while as large as at the start, or 6 times that
                continue
            if _FIELDS[field] != "total" and not self._is_harm(
                _FIELDS[field], move, any(each[block] > _SEEN for each in jumped)
            ):
                continue
            name, index = ("", -1) if _FIELDS[field] == "total" else (self._names[block], places[block])
            step = self._before if move.late else record.step
            found.append(Mover(**vars(move), step=step, name=name, index=index, field=_FIELDS[field]))
        if math.isfinite(total) and all(move.series != len(values) - 1 for move in moves):
            self._largest = max(self._largest, total)
        self._before = record.step
        return sorted(found, key=lambda mover: mover.index if mover.index >= 0 else len(names))

    def _is_harm(self, field: str, move: Move, seen: bool) -> bool:
        """Whether what a block does to gradients or activations is more than what training itself makes of it.

        Args:
            field: ``growth`` or ``gain``.
            move: what moved.
            seen: whether the gain of the block has jumped since the last record, or the one before.
        """
        change = move.value - move.usual
        if move.what == "spike" and abs(change) > self.rules.certain:
            return True
        if change * move.value < 0:  # a shrinking block that shrinks less, a growing one that grows less
            return False
        if move.what == "drift":
            return self._harm.lasts
        return field == "gain" or seen or self._harm.now

    def _compared(self, blocks: Blocks, places: list[int]) -> tuple[Array, Array]:
        """Growth and gain, but for what would compare outputs of different samples.

        A block that is left out for some micro-batches, at random or by a choice of the model, gives norms of the
        others alone: it is not judged then, nor what comes after it.
        """
        calls = blocks.calls[places].astype(float)
        self._most = calls if self._most is None else np.maximum(self._most, calls)
        share = np.ones(len(places))
        share[places] = calls / np.maximum(self._most, 1.0)
        partly = share < share.max()
        partly[1:] |= partly[:-1]
        return (
            np.where(partly, math.nan, blocks.growth)[places],
            np.where(partly, math.nan, blocks.gain)[places],
        )

    def _places(self, names: tuple[str, ...]) -> list[int]:
        """Where the blocks of the first record are in this one, which may have called them in another order."""
        if names == self._names:
            return list(range(len(names)))
        place = {name: index for index, name in enumerate(names)}
        return [place[name] for name in self._names]
