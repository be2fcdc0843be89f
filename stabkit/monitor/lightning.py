"""The monitor as a callback of Lightning; needs the ``lightning`` or ``pytorch_lightning`` package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stabkit.diagnosis import Finding
from stabkit.monitor.monitor import Monitor
from stabkit.monitor.record import Record
from stabkit.monitor.services import MLflowWriter, TensorBoardWriter, WandbWriter
from stabkit.monitor.writers import Writer

_PACKAGE = "lightning.pytorch" if importlib.util.find_spec("lightning") is not None else "pytorch_lightning"
_Callback: Any = importlib.import_module(_PACKAGE).Callback


class MonitorCallback(_Callback):  # type: ignore[misc]
    """Watches a Lightning run: one step of the monitor before each step of an optimizer.

    Gradients are those before Lightning clips them, and unscaled. Records, pictures and findings go to the loggers of
    the trainer, under ``stabkit/``, beside the writers given; a logger of another kind than TensorBoard, Weights &
    Biases and MLflow gets the numbers.

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
            writers = [*given, *(_Logged(trainer, logger) for logger in trainer.loggers)]
        wrapped = trainer.strategy.model
        model = pl_module.get_submodule(self._module) if self._module else wrapped
        self.monitor = Monitor(
            model,
            writers=writers,
            optimizer=trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **{"distributed": trainer.world_size > 1, **options},
        )

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Tensor) -> None:
        """Remember the loss; over micro-batches it adds up to their mean, and what made the last is known."""
        self._loss = loss if self._loss is None else self._loss.detach() + loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """A step of the monitor."""
        if self.monitor is not None:
            self.monitor.step(self._loss)
        self._loss = None

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Close the monitor, also after an error."""
        if self.monitor is not None:
            self.monitor.close()


class _Logged:
    """A logger of a trainer as a writer; its steps are those of the trainer, which may have begun in an earlier run."""

    def __init__(self, trainer: Any, logger: Any) -> None:
        self._trainer, self._logger = trainer, logger
        kind = type(logger).__name__
        made = _WRITERS.get(kind)
        self._writer: Writer | None = None if made is None else made(logger)

    def write(self, record: Record) -> None:
        """Log a record."""
        step = self._trainer.global_step
        if self._writer is not None:
            self._writer.write(replace(record, step=step))
            return
        self._logger.log_metrics({f"stabkit/{name}": value for name, value in record.scalars().items()}, step=step)

    def alert(self, finding: Finding, step: int) -> None:
        """Log a finding."""
        alert = getattr(self._writer, "alert", None)
        if alert is not None:
            alert(finding, self._trainer.global_step)

    def close(self) -> None:
        """Leave the logger open: it belongs to the trainer."""
        if self._writer is not None:
            self._writer.close()


_WRITERS: dict[str, Callable[[Any], Writer]] = {
    "TensorBoardLogger": lambda logger: TensorBoardWriter(logger.experiment),
    "WandbLogger": lambda logger: WandbWriter(logger.experiment),
    "MLFlowLogger": lambda logger: MLflowWriter(logger.run_id),
}
