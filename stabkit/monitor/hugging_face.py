"""The monitor as a callback of the Hugging Face Trainer; needs the ``transformers`` package."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from stabkit.monitor.monitor import Monitor


class MonitorCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Watches a run of ``transformers.Trainer``: one step of the monitor before each step of the optimizer.

    The Trainer has clipped the gradient by then (``max_grad_norm``) and does not hand on its loss: parameter gradients
    in the records are those after clipping, and the loss is missing. Activations, their gradients and growth are not
    touched by either.

    Args:
        **options: of `Monitor`, without model, optimizer and scaler. ``directory`` is the Trainer's ``output_dir``
            when it is not given; None keeps everything in memory.

    Attributes:
        monitor: the monitor, from the start of the training on.
    """

    def __init__(self, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the monitor."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs.get("optimizer")
        self.monitor = Monitor(
            model,
            optimizer=None if optimizer is None else getattr(optimizer, "optimizer", optimizer),
            scaler=getattr(optimizer, "scaler", None),
            **{"directory": args.output_dir, "distributed": args.world_size > 1, **self._options},
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the monitor."""
        if self.monitor is not None:
            self.monitor.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the monitor."""
        if self.monitor is not None:
            self.monitor.close()
