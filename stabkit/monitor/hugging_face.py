"""The monitor as a callback of the Hugging Face Trainer; needs the ``transformers`` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn

from stabkit.monitor.monitor import Monitor
from stabkit.monitor.watching import watch

_COUNTED = "num_items_in_batch"  # given where every micro-batch returns its part of the loss, and not a mean of its own


class TrainerCallback(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Watches a run of ``transformers.Trainer``: one step of the monitor before each step of the optimizer.

    The Trainer has clipped the gradient by then (``max_grad_norm``): parameter gradients in the records are those after
    clipping. Activations, their gradients and growth are not touched by it. The loss is what the model returns as
    ``loss``; one that the Trainer computes outside of it (``compute_loss_func``, label smoothing) is not seen.

    Args:
        **options: of `Monitor`, without model, optimizer and scaler. ``directory`` is the Trainer's ``output_dir``
            when it is not given; None keeps everything in memory.

    Attributes:
        monitor: the monitor, from the start of the training on.
    """

    def __init__(self, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._losses: list[Tensor] = []
        self._counted = False
        self._undo: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the monitor."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs.get("optimizer")
        self.monitor = Monitor(
            model,
            optimizer=optimizer,
            scaler=getattr(optimizer, "scaler", None),
            **{"directory": args.output_dir, "distributed": args.world_size > 1, **self._options},
        )
        self._undo = watch(model, self._after, self._before)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the monitor."""
        if self.monitor is not None:
            total = sum(self._losses[1:], self._losses[0]) if self._losses else None
            self.monitor.step(total if total is None or self._counted else total / len(self._losses))
        self._losses = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the monitor."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self.monitor is not None:
            self.monitor.close()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._counted = kwargs.get(_COUNTED) is not None

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:  # an evaluation in between has none
            self._losses.append(loss.detach().mean())
