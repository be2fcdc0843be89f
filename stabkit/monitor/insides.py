"""What goes on inside the blocks of a language model, looked at now and then: softmaxes, and Adam's epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from stabkit.diagnosis import Finding
from stabkit.monitor.epsilon import EpsilonShares
from stabkit.monitor.foresight import Foresight
from stabkit.monitor.growing import Growing
from stabkit.monitor.logit_weights import LogitWeights
from stabkit.monitor.measurement import Failed
from stabkit.monitor.parameters import Parameters
from stabkit.monitor.record import OF_LOSS, Array, Record
from stabkit.monitor.rules import AlertRules
from stabkit.monitor.scaling import ScaleWatch
from stabkit.monitor.softmaxes import Measured, SoftmaxWatch

EVERY = 10  # training steps between two looks at softmaxes
# Where the first looks have found logits alone and no attention: these drift slowly, and weights behind them that
# become longer at once, or a loss that leaves what is usual, start a look anyway. One takes a fifth of an MLP's step.
_SELDOM, _FIRST = 50, 10
_EPSILON_EVERY = 100  # and at epsilon, but for the first two


class Insides:
    """Looks inside every so many training steps, whatever is recorded, and where weights or the loss ask for it.

    Args:
        model: as it is called.
        blocks: the modules of the blocks whose calls are seen, by index.
        names: of all blocks.
        optimizers: of the run.
        parameters: of the model.
        scaler: of AMP, or None.
        foresight: what reads the loss of every step.
        rules: of the monitor.
        failed: told of an error inside a hook.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[int, nn.Module],
        names: tuple[str, ...],
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Parameters,
        scaler: Any,
        foresight: Foresight,
        rules: AlertRules | None,
        failed: Failed,
    ) -> None:
        self._foresight = foresight
        self._names, self._parameters = names, parameters
        self._scale = ScaleWatch(scaler, (rules or AlertRules()).overflows, self._not_finite)
        self._growing = Growing(names, rules)
        self._softmaxes = SoftmaxWatch(model, blocks, failed)
        self._weights = LogitWeights(parameters.tensors)
        self._epsilon = EpsilonShares(optimizers, parameters)
        self._next, self._epsilon_next = 0, EVERY
        self._looking = False
        self._looks, self._attends = 0, False
        self._pending: tuple[int, Measured] | None = None
        self._columns: Array | None = None
        self._of_loss = (math.nan, math.nan)

    def attach(self, step: int) -> None:
        """Look at a step where one is due."""
        self._looking = step >= self._next
        if self._looking:
            self._softmaxes.on()
        else:
            self._softmaxes.off()

    def detach(self) -> None:
        """No hook stays behind."""
        self._softmaxes.off()
        self._looking = False

    def look(self, step: int, loss: Any, *, wait: bool, told: bool) -> list[Finding]:
        """What there is to say at a step.

        Args:
            step: the training step.
            loss: as it was differentiated.
            wait: whether numbers on a device are read at once, and not in the next step.
            told: whether it is known already that something is not finite.
        """
        found = self._scale.look(step, told=told or self._foresight.broken)
        self._growing.see(self._foresight.loss)
        pending, self._pending = self._pending, None
        if self._looking:
            measured = self._softmaxes.take(loss)
            self._looks += 1
            self._attends |= measured is not None and bool(measured.attentions)
            self._next = step + (EVERY if self._attends or self._looks < _FIRST else _SELDOM)
            self._softmaxes.off()  # what follows may run the model itself
            if measured is not None:
                self._pending = (step, measured)
                self._weights.watch(measured.weights)
        if pending is not None:
            found += self._read(*pending)
        if self._pending is not None and (wait or self._pending[1].on_host):
            found += self._read(*self._pending)
            self._pending = None
        if step >= self._epsilon_next:
            self._epsilon_next = step + (EVERY if step < 2 * EVERY else _EPSILON_EVERY)
            shares, *sizes = self._epsilon.measured(len(self._names))
            self._kept()[2] = shares
            found += self._growing.judge_epsilon(step, shares, *sizes)
        if self._weights.grew(step) or self._growing.soon or self._foresight.suspicious:
            self._next = step + 1
        return found

    def into(self, record: Record) -> dict[str, Any]:
        """What a record gets of what was seen since the one before, by the names of its fields."""
        columns, self._columns = self._columns, None
        of_loss, self._of_loss = self._of_loss, (math.nan, math.nan)
        found: dict[str, Any] = dict(zip(OF_LOSS, of_loss, strict=True))
        if columns is not None:
            found["blocks"] = record.blocks.with_inside(self._names, columns)
        return found

    def _not_finite(self) -> tuple[tuple[str, ...], list[bool]]:
        """The blocks with parameters, and whether their gradients of this step are not finite."""
        norms, trained = self._parameters.gradients({})
        owners = self._parameters.owners
        bad = {int(owners[i]) for i, size in zip(trained, norms, strict=True) if not math.isfinite(float(size))}
        held = sorted({int(owners[i]) for i in trained} - {len(self._names)})
        return tuple(self._names[i] for i in held), [i in bad for i in held]

    def _read(self, step: int, measured: Measured) -> list[Finding]:
        of_blocks, of_loss = measured.read(len(self._names))
        if measured.attentions:
            self._kept()[:2] = of_blocks[:2]
        self._of_loss = float(of_loss[1]), float(of_loss[0])
        found = self._growing.judge(step, of_blocks, of_loss, measured.resolution)
        return [self._foresight.causes.with_rise(finding, step) for finding in found]

    def _kept(self) -> Array:
        if self._columns is None:
            self._columns = np.full((3, len(self._names)), math.nan)
        return self._columns
