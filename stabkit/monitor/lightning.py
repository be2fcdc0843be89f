"""The monitor as a callback of Lightning; needs the ``lightning`` or ``pytorch_lightning`` package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stabkit.monitor.monitor import Monitor
from stabkit.monitor.record import Record

_PACKAGE = "lightning.pytorch" if importlib.util.find_spec("lightning") is not None else "pytorch_lightning"
_Callback: Any = importlib.import_module(_PACKAGE).Callback


class MonitorCallback(_Callback):  # type: ignore[misc]
    """Watches a Lightning run: one step of the monitor before each step of an optimizer.

    Gradients are those before Lightning clips them, and unscaled. Records go to the loggers of the trainer, under
    ``stabkit/``, beside the writers given.

    Args:
        module: path of the network within the LightningModule, such as ``"net"``. A capsule holds the calls of this
            module, so it has to be one that is called: a LightningModule whose ``training_step`` calls ``self.net(x)``
            is not called itself. Empty for the LightningModule.
        log: whether records go to the loggers of the trainer.
        **options: of `Monitor`, without model, optimizer and scaler.

    Attributes:
        monitor: the monitor, from the start of the training on.
    """

    def __init__(self, module: str = "", *, log: bool = True, **options: Any) -> None:
        super().__init__()
        self.monitor: Monitor | None = None
        self._module = module
        self._log = log
        self._options = options
        self._loss: Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the monitor."""
        options = dict(self._options)
        writers = options.pop("writers", None)
        if self._log and trainer.loggers:
            directory = options.get("directory")
            given = writers if writers is not None else [f"{directory}/records.jsonl"] if directory is not None else []
            writers = [*given, lambda record: _log(trainer, record)]
        wrapped = trainer.strategy.model
        model = pl_module.get_submodule(self._module) if self._module else wrapped
        self.monitor = Monitor(
            model,
            writers=writers,
            optimizer=_bare(trainer.optimizers),
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **{"distributed": trainer.world_size > 1, **options},
        )

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Tensor) -> None:
        """Remember the loss; over micro-batches it adds up to their mean."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """A step of the monitor."""
        if self.monitor is not None:
            self.monitor.step(self._loss)
        self._loss = None

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Close the monitor, also after an error."""
        if self.monitor is not None:
            self.monitor.close()


def _bare(optimizers: Sequence[Any]) -> list[Any]:
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]


def _log(trainer: Any, record: Record) -> None:
    metrics = {f"stabkit/{name}": value for name, value in record.scalars().items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
