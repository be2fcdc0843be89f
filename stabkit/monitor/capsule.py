"""The flight recorder's disk: at most so many capsules, each whole."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabkit._version import __version__
from stabkit.checkpoints.capsules import RecordedCall, is_capsule, write_capsule
from stabkit.diagnosis import Finding
from stabkit.monitor.batches import Odd
from stabkit.monitor.inputs import RecordedInputs
from stabkit.monitor.outlets import LOGGER
from stabkit.monitor.ranks import TrainingRanks
from stabkit.monitor.record import Record
from stabkit.monitor.snapshots import Snapshot
from stabkit.monitor.writers import json_line

RECORDS = 100  # the newest of the ring buffer that go into a capsule
FINDINGS = 8  # the newest likewise


@dataclass(frozen=True)
class Kept:
    """What goes into a capsule, from all processes.

    Attributes:
        calls: forward calls, process after process.
        complete: whether these are all.
        weights: the weights of the whole model.
    """

    calls: list[RecordedCall]
    complete: bool
    weights: dict[str, Tensor]


class CapsuleStore:
    """Writes capsules into ``directory/capsules`` and removes the oldest beyond ``limit``.

    A new capsule is whole before an old one goes, and a removal is one rename: whenever the process is killed, what
    has a capsule's name is a whole capsule. What is left of a killed write goes with the next one.
    """

    def __init__(
        self, directory: Path | None, limit: int, model: nn.Module, model_factory: str | None, ranks: TrainingRanks
    ) -> None:
        self.enabled = directory is not None and limit > 0
        self._directory = Path() if directory is None else directory / "capsules"
        self._limit = limit
        self._model = model
        self._factory = model_factory
        self._ranks = ranks
        self._broken = False
        self._written: list[Path] = []

    @property
    def paths(self) -> tuple[Path, ...]:
        """The capsules of this run that are on disk, in the order in which they were written."""
        return tuple(path for path in self._written if is_capsule(path))

    def _by_age(self) -> list[Path]:
        """All capsules in the directory, those of earlier runs first."""
        found = [path for path in self._directory.glob("step-*") if is_capsule(path)]
        age = {path: place for place, path in enumerate(self._written)}
        return sorted(found, key=lambda path: (age.get(path, -1), path.stat().st_mtime_ns))

    def gather(self, inputs: RecordedInputs) -> Kept:
        """The calls and the weights of all processes, which all have to call this.

        The calls of a process that fail to be copied are left out, and the capsule says that it is not complete.
        """
        try:
            calls = [captured.to_call() for captured in inputs.captured]
            complete = inputs.complete and bool(calls)
        except Exception as error:  # the other processes wait for this one
            warnings.warn(f"stabkit's monitor: a batch cannot be kept: {error}", RuntimeWarning, stacklevel=5)
            calls, complete = [], False
        gathered = self._ranks.gather((calls, complete))
        return Kept(
            [call for part, _ in gathered for call in part],
            all(whole for _, whole in gathered),
            self._ranks.whole_weights(self._model),
        )

    def write(
        self,
        reason: str,
        record: Record,
        kept: Kept,
        records: Iterable[Record],
        *,
        scale: float,
        autocast: Mapping[str, str],
        known: Mapping[str, Any],
        findings: Sequence[Finding],
        before: Snapshot | None = None,
        why_none: str = "",
        blamed: Odd | None = None,
    ) -> None:
        """Write a capsule, in the first process; nothing more after one could not be written.

        Args:
            reason: why.
            record: the record of this step.
            kept: its calls and weights.
            records: those up to it.
            scale: the loss scale of AMP.
            autocast: dtype by device type, where autocast was on.
            known: what the monitor knew of the optimizer and its updates.
            findings: what it said up to this step.
            before: the last good state.
            why_none: why there can be none, where that is so.
            blamed: the batch that is to blame, of an earlier step or one of several of this.
        """
        if self._broken or not self._ranks.first:
            return
        path = self._directory / f"step-{record.step:09d}-{re.sub('[^a-z0-9]+', '-', reason.lower())[:60].strip('-')}"
        if path in self._written:
            return
        path = next(each for each in _names(path) if not each.exists())  # an earlier run may have left one
        self._broken = True  # unless it is written
        self._sweep()
        lost = write_capsule(
            path,
            weights=kept.weights,
            calls=kept.calls,
            manifest={
                "step": record.step,
                "reason": reason,
                "complete": kept.complete,
                "training": self._model.training,
                "unlike": [n for n, m in self._model.named_modules() if m.training != self._model.training],
                "autocast": dict(autocast),
                "scale": scale,
                "processes": self._ranks.count,
                "model_factory": self._factory,
                "model_class": f"{type(self._model).__module__}.{type(self._model).__qualname__}",
                "known": dict(known),
                "findings": [finding.to_dict() for finding in list(findings)[-FINDINGS:]],
                "record": json.loads(json_line(record)),
                "before": _told(before, why_none),
                "versions": {"stabkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
            },
            records=map(json_line, list(records)[-RECORDS:]),
            before={} if before is None else before.whole(),
            blamed=None if blamed is None or _is_all(blamed, record, kept) else (blamed.step, blamed.call),
        )
        self._written.append(path)
        for old in self._by_age()[: -self._limit]:
            self._remove(old)
        self._broken = False
        why = f"an argument of the model is a {lost}" if lost else "" if kept.complete else "not all calls were kept"
        if why:
            LOGGER.warning("stabkit: the capsule %s cannot be run again: %s", path, why)

    def _remove(self, path: Path) -> None:
        away = path.with_name(f".step-removed-{uuid.uuid4().hex}")
        os.replace(path, away)
        shutil.rmtree(away)

    def _sweep(self) -> None:
        for left in self._directory.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)


def _is_all(blamed: Odd, record: Record, kept: Kept) -> bool:
    """Whether the batch that is to blame is all that a capsule holds anyway."""
    return blamed.step == record.step and len(kept.calls) == 1


def _told(before: Snapshot | None, why_none: str) -> dict[str, Any]:
    """What the manifest says of the last good state."""
    if before is None:
        return {"why_none": why_none or "none had been taken before the trouble began"}
    finite = before.loss if math.isfinite(before.loss) else None
    rates = [rate if math.isfinite(rate) else None for rate in before.learning_rates]
    return {"step": before.step, "loss": finite, "learning_rates": rates, "numbers": before.numbers}


def _names(path: Path) -> Iterator[Path]:
    """A path, and further ones like it."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")
