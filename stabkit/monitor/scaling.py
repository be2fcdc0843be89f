"""What a loss scaler of AMP has done to the gradients of the present step."""

from __future__ import annotations

from typing import Any

from torch import Tensor


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
