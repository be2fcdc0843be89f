"""What a loss scaler of AMP has done to the gradients of the present step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from stabkit.diagnosis import Finding
from stabkit.diagnosis.finding import of_training
from stabkit.monitor.losses import LossReader

AT_START = 16  # halvings in a row that are no harm before the first step: from the 65536 that torch begins with to 1


def gradient_scale(scaler: Any) -> Tensor | float:
    """What the gradients are multiplied by at present; 1 without a scaler."""
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return 1.0 if scale is None or is_unscaled(scaler) else scale


def is_unscaled(scaler: Any) -> bool:
    """Whether ``scaler.unscale_`` has been called for the optimizers in this step, or there is no scaler."""
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is None:
        return True
    stages = [state["stage"] for state in states.values()]
    return any(getattr(stage, "name", "") in ("UNSCALED", "STEPPED") for stage in stages)


def unscaled_by(scaler: Any) -> float:
    """What ``scaler.unscale_`` has divided the gradients by in this step; 1 where it was not called."""
    scale = getattr(scaler, "_scale", None) if is_unscaled(scaler) else None
    return 1.0 if scale is None else float(scale)


class ScaleWatch:
    """Sees a scaler of AMP that keeps halving its scale, at every training step, whatever is recorded.

    A scaler doubles its scale until a gradient is infinite, leaves that step out and goes back: once or twice in a row
    is how it works, and so are several from the large scale that it begins with.

    Args:
        scaler: that of the run; None where there is none.
        overflows: how many halvings in a row are too many.
        where: names the blocks, in their order, and says which have gradients that are not finite.
    """

    def __init__(self, scaler: Any, overflows: int, where: Callable[[], tuple[Sequence[str], Sequence[bool]]]) -> None:
        self._scaler, self._overflows, self._where = scaler, overflows, where
        self._reader = LossReader()
        self._scale = 0.0  # the newest
        self._halvings = 0  # in a row
        self._worked = self._told = False

    def look(self, step: int, *, told: bool = False) -> list[Finding]:
        """What there is to say at a step, of the updates before it.

        Args:
            step: the training step.
            told: whether it is known already that something is not finite.
        """
        scale: Tensor | None = getattr(self._scaler, "_scale", None)
        found = []
        for at, value in () if scale is None else self._reader.take(step, scale):
            before, self._scale = self._scale, value
            fell = value < before
            self._worked |= not fell and before > 0
            self._halvings = self._halvings + 1 if fell else 0
            self._told &= fell
            if self._halvings >= (self._overflows if self._worked else AT_START) and not self._told:
                self._told = True
                found += [] if told else [self._finding(at)]
        return found

    def _finding(self, step: int) -> Finding:
        began = step - self._halvings
        names, bad = self._where()
        last = max((i for i, each in enumerate(bad) if each), default=-1)
        place = "" if last < 0 else f"; of the parameters, those of {names[last]} have such gradients"
        if last > 0 and all(bad[:last]):
            place += f" and those of {last} block{'s' * (last > 1)} before it"
        if 0 <= last < len(names) - 1:
            place += f", and none after it: it begins there, or between it and {names[last + 1]}"
        told = of_training(
            "non_finite",
            "critical",
            f"the gradients have been infinite or NaN at {self._halvings} training steps in a row since training step "
            f"{began}, and the loss scale has come down to {self._scale:.4g}: no update was made, and lowering the "
            f"scale does not help{place}",
            "look at the batches since then and at what is not finite in the capsule: a scale that is too large is "
            "mended by one halving or two; lower the learning rate, clip the gradient, or train in bfloat16",
            "Micikevicius et al., Mixed precision training, 2018",
            {"training_step": float(step), "began": float(began), "scale": self._scale},
        )
        return told if last < 0 else replace(told, module_path=names[last], steps=(last,))
