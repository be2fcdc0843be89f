"""Whether a training step is fit to be taken: what a loop asks before it lets the optimizer step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis import Finding
from stabkit.monitor.parameters import Parameters, local
from stabkit.monitor.ranks import TrainingRanks
from stabkit.monitor.rules import AlertRules

_LEVEL = 4  # steps in a row that are too large, of which the last is let pass: as many losses in a row are a level too
_OF_ALL = 0.5  # of the largest gradient of all before: a smaller one has been borne


class Seen:
    """What a monitor saw of one training step.

    Attributes:
        step: number of the training step.
        findings: what was found at it.
    """

    def __init__(self, step: int, findings: tuple[Finding, ...] = (), judge: Callable[[], bool] | None = None) -> None:
        self.step = step
        self.findings = findings
        self._judge = judge

    @cached_property
    def healthy(self) -> bool:
        """Whether loss and gradients are finite and no larger than steps have borne before, so that a step may be made.

        It is measured when asked for: that reads every gradient once and waits for the device. Processes that train
        together all have to ask, and get the same answer. What is asked for once is remembered.
        """
        return True if self._judge is None else self._judge()

    def __repr__(self) -> str:
        return f"Seen(step={self.step}, findings={[finding.kind for finding in self.findings]})"


class Health:
    """Judges steps by their loss, their findings, and the size of their gradient beside those before.

    A gradient is too large where its norm is more than ``exp(rules.jump)`` times the largest of the last
    ``rules.history`` healthy steps, and more than half of the largest of all. What stays so for a few steps is a new
    level, of other data or another weight of the loss, and no broken batch: it is let pass. In 40 healthy trainings of
    five kinds of networks on digits (four optimizers, batches of 4 and 32, 400 steps) no norm was more than 1.9 times
    the largest of the 50 before it.

    A step that is left out has gone through the model all the same: running statistics that it has spoilt are told.

    Args:
        model: whose buffers are looked at where a step is left out.
        parameters: whose gradients are read.
        rules: of the monitor.
        ranks: the processes that train together.
        tell: takes what there is to say.
        scaler: of the loss, which skips infinite gradients by itself; None without one.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        rules: AlertRules | None,
        ranks: TrainingRanks,
        tell: Callable[[list[Finding]], None],
        scaler: Any,
    ) -> None:
        rules = rules or AlertRules()
        self._model, self._tell = model, tell
        self._by_design = _not_finite(model)  # such as masks
        self._spoilt: set[str] = set()
        self._parameters, self._ranks, self._scaled = parameters, ranks, scaler is not None
        self._warmup, self._factor = rules.warmup, math.exp(rules.jump)
        self._recent: deque[float] = deque(maxlen=rules.history)
        self._largest = 0.0
        self._above = 0  # how many in a row were too large
        self.skipped = 0

    def judge(
        self, step: int, loss: Tensor | float | None, findings: tuple[Finding, ...], scale: Tensor | float
    ) -> bool:
        """Whether the step is healthy; one that is not is counted as skipped.

        Args:
            step: the training step.
            loss: its loss.
            findings: of this step.
            scale: what the gradients are multiplied by.
        """
        broken = loss is not None and not math.isfinite(float(torch.as_tensor(loss).detach().sum()))
        broken = broken or any(finding.kind == "non_finite" for finding in findings)
        jumped = any(finding.kind == "exploding" for finding in findings)
        norms, _ = self._parameters.gradients({})
        squares = float(torch.stack([n.detach().double().cpu() for n in norms]).square().sum()) if norms else 0.0
        squares, (broken, jumped) = self._ranks.agreed(squares, broken, jumped)
        norm = math.sqrt(squares) / float(scale)
        large = jumped or not self._is_borne(norm)
        self._above = self._above + 1 if large and not broken and math.isfinite(norm) else 0
        healthy = not broken and (not large or self._above >= _LEVEL)
        if healthy and 0.0 < norm < math.inf:
            self._recent.append(norm)
            self._largest, self._above = max(self._largest, norm), 0
        self.skipped += not healthy
        if not healthy:
            self._look_at_buffers(step)
        return healthy

    def _look_at_buffers(self, step: int) -> None:
        spoilt = _not_finite(self._model) - self._by_design
        news, self._spoilt = spoilt - self._spoilt, spoilt
        if news:
            self._tell([_spoilt(step, [name for name, _ in _kept_buffers(self._model) if name in news])])

    def _is_borne(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return self._scaled
        if len(self._recent) < self._warmup:
            return True
        return norm <= max(self._factor * max(self._recent), _OF_ALL * self._largest)


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of floats that a checkpoint has, such as running statistics, by their names."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            kept = buffer is not None and name not in module._non_persistent_buffers_set
            if kept and buffer.is_floating_point() and not buffer.is_meta:
                yield f"{path}.{name}" if path else name, local(buffer)


def _not_finite(model: nn.Module) -> set[str]:
    return {name for name, buffer in _kept_buffers(model) if not bool(buffer.isfinite().all())}


def _spoilt(step: int, names: list[str]) -> Finding:
    home = names[0].rpartition(".")[0]
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(),
        module_path=home,
        confidence=1.0,
        evidence=f"the update of training step {step} is left out, but its batch has gone through the model: the "
        f"buffer {names[0]}{others} is not finite any more, with which the model gives NaN in evaluation",
        remedy="load these buffers from an earlier checkpoint (a capsule has the last good ones), or call "
        "reset_running_stats() of their modules and run some good batches through the model in training mode; look at "
        "batches before they go in (x.isfinite().all())",
        reference="",
        numbers={"training_step": float(step), "buffers": float(len(names))},
    )
