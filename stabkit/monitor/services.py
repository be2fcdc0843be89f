"""Records in TensorBoard, Weights & Biases and MLflow: a few curves, pictures over depth, marks at findings."""

from __future__ import annotations

import os
from typing import Any

from stabkit.diagnosis import Finding
from stabkit.errors import ArgumentError
from stabkit.monitor.charts import Charts
from stabkit.monitor.record import Record
from stabkit.monitor.sentences import line

_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
_LONGEST = 5000  # letters of a tag, in MLflow


class TensorBoardWriter:
    """Scalars, pictures and texts for TensorBoard, all under ``stabkit/``; needs the ``tensorboard`` package.

    Args:
        target: a directory, or a ``SummaryWriter`` that is already open (and stays open).
    """

    def __init__(self, target: Any) -> None:
        self._own = isinstance(target, str | os.PathLike)
        if self._own:
            from torch.utils.tensorboard import SummaryWriter

            target = SummaryWriter(log_dir=os.fspath(target))
        self._board = target
        self._charts = Charts()

    def write(self, record: Record) -> None:
        """Log the scalars of a record, and the pictures of the run so far where they are due."""
        for name, value in record.scalars().items():
            self._board.add_scalar(f"stabkit/{name}", value, record.step, walltime=record.time)
        self._charts.add(record)
        if self._charts.due:
            self._draw()

    def alert(self, finding: Finding, step: int) -> None:
        """Log a finding as a text at its step."""
        self._board.add_text("stabkit/findings", line(finding, step), step)

    def close(self) -> None:
        """Draw the whole run, and close the board if it was opened here; otherwise flush it."""
        self._draw()
        self._board.close() if self._own else self._board.flush()

    def _draw(self) -> None:
        for quantity, picture in self._charts.drawn().items():
            self._board.add_image(f"stabkit/{quantity}", picture, self._charts.step, dataformats="HWC")


class WandbWriter:
    """Scalars, pictures and alerts for Weights & Biases; needs the ``wandb`` package.

    Args:
        run: the run; None is the current one.

    Raises:
        ArgumentError: there is no run.
    """

    def __init__(self, run: Any = None) -> None:
        import wandb

        run = wandb.run if run is None else run
        if run is None:
            raise ArgumentError("no Weights & Biases run is active; call wandb.init first or pass the run")
        self._wandb, self._run = wandb, run
        self._charts = Charts()
        run.define_metric("stabkit/step", hidden=True)
        run.define_metric("stabkit/*", step_metric="stabkit/step")

    def write(self, record: Record) -> None:
        """Log a record at once, with the training step as ``stabkit/step``."""
        logged = {f"stabkit/{name}": value for name, value in record.scalars().items()}
        self._charts.add(record)
        pictures = self._pictures() if self._charts.due else {}
        self._run.log({**logged, **pictures, "stabkit/step": record.step})

    def alert(self, finding: Finding, step: int) -> None:
        """Send an alert, which the service passes on as its user has set it up."""
        title, level = f"stabkit: {finding.kind}", _LEVELS[finding.severity]
        self._run.alert(title=title, text=line(finding, step), level=level, wait_duration=0)

    def close(self) -> None:
        """Log the pictures of the whole run, which stays open: it belongs to the caller."""
        pictures = self._pictures()
        if pictures:
            self._run.log({**pictures, "stabkit/step": self._charts.step})

    def _pictures(self) -> dict[str, Any]:
        return {f"stabkit/{quantity}": self._wandb.Image(array) for quantity, array in self._charts.drawn().items()}


class MLflowWriter:
    """Metrics, pictures and tags for MLflow; needs the ``mlflow`` package.

    Args:
        run_id: the run; None is the active one.
    """

    def __init__(self, run_id: str | None = None) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        self._run_id = run_id
        self._charts = Charts()

    def write(self, record: Record) -> None:
        """Log all metrics of a record at once, and the pictures of the run so far where they are due."""
        metrics = {f"stabkit/{name}": value for name, value in record.scalars().items()}
        self._mlflow.log_metrics(metrics, step=record.step, run_id=self._run_id)
        self._charts.add(record)
        if self._charts.due:
            self._draw()

    def alert(self, finding: Finding, step: int) -> None:
        """Tag the run with a finding, under its training step and kind."""
        self._client().set_tag(self._id(), f"stabkit.{step}.{finding.kind}", line(finding, step)[:_LONGEST])

    def close(self) -> None:
        """Log the pictures of the whole run, which stays open: it belongs to the caller."""
        self._draw()

    def _draw(self) -> None:
        for quantity, picture in self._charts.drawn().items():
            name = f"stabkit/{quantity}-{self._charts.step:08d}.png"
            self._client().log_image(self._id(), picture, artifact_file=name)

    def _client(self) -> Any:
        return self._mlflow.MlflowClient()

    def _id(self) -> str:
        return self._run_id or str(self._mlflow.active_run().info.run_id)
