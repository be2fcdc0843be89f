"""Parameters that get no gradient, and blocks behind which it is exactly zero; each is said once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from stabkit.diagnosis import Finding
from stabkit.monitor.record import Record
from stabkit.tracing.derivatives.lost_gradient import listed

_GRADIENT, _PARAMETER_GRADIENT = 1, 3  # rows of `Blocks.norms`


class Silence:
    """What no gradient comes to in a model that is being trained.

    Args:
        model: whose parameters are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._without: set[str] = set()
        self._told = False
        self._alive: set[str] = set()  # blocks that had a gradient once
        self._silent: set[str] = set()  # blocks that had none in the record before
        self._dead: set[str] = set()

    def judge(self, record: Record) -> list[Finding]:
        """The findings that a record gives rise to; call it while the gradients of its step are there."""
        return [*self._lost(record), *self._stopped(record)]

    def _lost(self, record: Record) -> list[Finding]:
        """Parameters without a gradient in two records, while others, and none of the same role, have one."""
        if self._told:
            return []
        trained = {path: p.grad is not None for path, p in self._parameters.items() if p.requires_grad and p.numel()}
        roles = {_role(path) for path, has in trained.items() if has}
        without = {path for path, has in trained.items() if not has and _role(path) not in roles} if roles else set()
        lost = [path for path in trained if path in without & self._without]
        self._without = without
        if not lost:
            return []
        now = dict(self._model.named_parameters())
        if any(now.get(path) is not self._parameters[path] for path in lost):  # layers were replaced
            self._parameters, self._without = now, set()
            return []
        self._told = True
        return [_no_gradient(record, lost, trained)]

    def _stopped(self, record: Record) -> list[Finding]:
        """The last block whose output gets a gradient of exactly zero, while a block behind it gets one.

        At once where there was a gradient before; else in the second record, since what starts at zero wakes up with
        the first update.
        """
        norms, names = record.blocks.norms, record.blocks.names
        alive = norms[_GRADIENT] > 0
        zero = (norms[_GRADIENT] == 0) & ~(norms[_PARAMETER_GRADIENT] > 0)
        places = [int(i) for i in np.flatnonzero(zero) if alive[i + 1 :].any()]
        silent = {names[i] for i in places}
        known = silent & (self._alive | self._silent) - self._dead
        self._alive |= {names[i] for i in np.flatnonzero(alive)}
        self._silent = silent
        last = places[-1] if places else -1
        self._dead = {name for name in self._dead if name in silent}
        if not known or names[last] not in known:
            return []
        self._dead |= silent
        return [_dead(record, last, [names[i] for i in places])]


def _role(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _no_gradient(record: Record, lost: Sequence[str], trained: Mapping[str, bool]) -> Finding:
    home = lost[-1].rpartition(".")[0]
    return Finding(
        kind="no_gradient",
        severity="warning",
        steps=tuple(i for i, name in enumerate(record.blocks.names) if any(p.startswith(f"{name}.") for p in lost)),
        module_path=home,
        confidence=1.0,
        evidence=f"at training step {record.step}, as before, {len(lost)} of {len(trained)} parameters that are to be "
        f"trained have no gradient: {listed(tuple(lost))}",
        remedy=f"look behind {home}: a detach, argmax, no_grad, or a result that nothing uses; stabkit.analyze(model, "
        "batch, loss=...) names the operation. If it is meant, set requires_grad_(False) on them",
        reference="",
        numbers={"training_step": float(record.step), "parameters": float(len(lost))},
    )


def _dead(record: Record, place: int, silent: Sequence[str]) -> Finding:
    name = record.blocks.names[place]
    behind = record.blocks.names[place + 1]
    also = "" if len(silent) == 1 else f", nor do the {len(silent) - 1} blocks before it"
    return Finding(
        kind="dead",
        severity="critical",
        steps=(place,),
        module_path=name,
        confidence=1.0,
        evidence=f"at training step {record.step} the output of {name} gets a gradient of exactly zero{also}, while "
        f"{behind} gets one: what lies between passes nothing for any sample of the batch",
        remedy=f"go back to an earlier checkpoint, or draw the weights of {name} anew, and lower the learning rate; "
        "units that leak below zero (LeakyReLU, GELU) come back by themselves",
        reference="Lu et al., Dying ReLU and initialization, 2019",
        numbers={"training_step": float(record.step), "blocks": float(len(silent))},
    )
