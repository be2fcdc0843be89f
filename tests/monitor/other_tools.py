"""Ways of watching a training run, the monitor's and those of other tools, behind one interface; see `comparison`."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor
from stabkit.monitor.record import BlockRecord

EVERY = 10  # training steps between two records of the monitor, and two tables of the diagnostics


class Heard(io.StringIO):
    """What is printed, by training step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.by_step: dict[int, list[str]] = defaultdict(list)

    def write(self, text: str) -> int:
        self.by_step[self.step].append(text)
        return len(text)

    def lines(self, step: int) -> list[str]:
        return [line for line in "".join(self.by_step[step]).splitlines() if line.strip()]


class Tool:
    """A way of watching; this one does not."""

    name, package, alarm = "none", "torch", r"(?!)"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, heard: Heard) -> None:
        self.model, self.optimizer, self.scaler, self.heard = model, optimizer, scaler, heard
        self.numbers: dict[int, dict[str, float]] = defaultdict(dict)  # what it shows without a word, by training step

    def drive(self, step: Callable[[Any], float], batches: Iterable[Any]) -> None:
        for batch in batches:
            step(batch)

    def watch(self, loss: Tensor) -> None:
        """Look, between the backward pass and the optimizer's step."""

    def close(self) -> None:
        """Let go."""


class Stabkit(Tool):
    name, alarm = "stabkit.Monitor", r"stabkit: training step \d+: (?P<words>.*)"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.handler = logging.StreamHandler(self.heard)
        self.logger = logging.getLogger("stabkit.monitor")
        self.logger.addHandler(self.handler)
        self.before, self.logger.propagate = self.logger.propagate, False
        self.monitor = Monitor(self.model, EVERY, optimizer=self.optimizer, scaler=self.scaler, writers=[])

    def watch(self, loss: Tensor) -> None:
        self.monitor.step(loss)

    def close(self) -> None:
        self.monitor.close()
        self.logger.removeHandler(self.handler)
        self.logger.propagate = self.before
        measures = [f.name for f in fields(BlockRecord) if f.name not in ("name", "calls", "non_finite")]
        for record in self.monitor.records:
            shown = {"loss": record.loss, "gradient": record.gradient_norm, "log z": record.log_z}
            shown |= {f"{block.name} {what}": getattr(block, what) for block in record.blocks for what in measures}
            broken = {"not finite": math.inf} if record.non_finite else {}
            self.numbers[record.step] = {k: v for k, v in shown.items() if not math.isnan(v)} | broken


class Underflow(Tool):
    """``DebugUnderflowOverflow`` as its documentation sets it up; it ends the run."""

    name, package, alarm = "DebugUnderflowOverflow", "transformers", r"(?P<words>.* has (nans|infs))"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        importlib.import_module("transformers.debug_utils").DebugUnderflowOverflow(self.model)

    def drive(self, step: Callable[[Any], float], batches: Iterable[Any]) -> None:
        try:
            super().drive(step, batches)
        except ValueError as error:
            self.heard.write(f"ValueError: {error}\n")


class Diagnostics(Tool):
    """What icefall's diagnostics print of every module, and the check for what is not finite, in a few lines.

    Of outputs and gradients: percentiles of the mean absolute value over channels, and the root mean square, over the
    batches since the last table. icefall itself prints one table after some batches of an epoch, and then ends.
    """

    name, alarm = "icefall-like diagnostics", r"WARNING: (?P<words>.*)"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.sums: dict[str, list[Tensor]] = defaultdict(list)
        self.squares: dict[str, list[Tensor]] = defaultdict(list)
        self.calls = 0
        for name, module in self.model.named_modules():
            module.register_forward_hook(lambda _, args, output, name=name: self.forward(name, output))

    def forward(self, name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.requires_grad:
            self.take(f"{name}.output", output.detach())
            output.register_hook(lambda gradient: self.take(f"{name}.gradient", gradient))

    def take(self, what: str, x: Tensor) -> None:
        x = x.float().reshape(-1, x.shape[-1] if x.dim() else 1)
        self.sums[what].append(x.abs().mean(0))
        self.squares[what].append(x.square().mean())
        self.check(what, x)

    def check(self, what: str, x: Tensor) -> None:
        if not math.isfinite(x.sum().item()):
            print(f"WARNING: the sum of {what} is not finite")

    def watch(self, loss: Tensor) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.check(f"{name}.param_grad", parameter.grad)
        self.calls += 1
        if self.calls % EVERY == 0:
            for what, sums in self.sums.items():
                levels = torch.stack(sums).mean(0).sort().values
                marks = [levels[round(q * (len(levels) - 1))].item() for q in (0, 0.25, 0.5, 0.75, 1)]
                rms = torch.stack(self.squares[what]).mean().sqrt().item()
                print(f"{what} abs-mean percentiles: {' '.join(f'{x:.2g}' for x in marks)}, rms: {rms:.3g}")
                self.numbers[self.heard.step] |= {f"{what} largest": marks[-1], f"{what} rms": rms}
            self.sums.clear()
            self.squares.clear()


class Ignite(Tool):
    """``GradsScalarHandler`` at every iteration, the loss beside it, and ``TerminateOnNan`` on the loss."""

    name, package, alarm = "ignite", "ignite", r"(?P<words>TerminateOnNan: .*)"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.events = importlib.import_module("ignite.engine").Events.ITERATION_COMPLETED
        board = importlib.import_module("ignite.handlers.tensorboard_logger")
        self.directory = tempfile.TemporaryDirectory()
        self.logger = board.TensorboardLogger(log_dir=self.directory.name)
        self.gradients = board.GradsScalarHandler(self.model, reduction=self.norm())
        self.loss = board.OutputHandler("training", output_transform=lambda loss: {"loss": loss})
        self.stop = importlib.import_module("ignite.handlers").TerminateOnNan()
        self.stop.logger.handlers[:] = [logging.StreamHandler(self.heard)]  # for its own two, which say it twice
        self.engine = self.engine_of(lambda _, batch: 0.0)

    def norm(self) -> Callable[[Tensor], Tensor]:
        def norm(gradient: Tensor) -> Tensor:
            value = torch.norm(gradient)
            here = self.numbers[self.heard.step]
            here[str(len(here))] = value.item()
            return value

        return norm

    def engine_of(self, update: Callable[[Any, Any], float]) -> Any:
        return importlib.import_module("ignite.engine").Engine(update)

    def drive(self, step: Callable[[Any], float], batches: Iterable[Any]) -> None:
        engine = self.engine_of(lambda _, batch: step(batch))
        self.logger.attach(engine, event_name=self.events, log_handler=self.gradients)
        self.logger.attach(engine, event_name=self.events, log_handler=self.loss)
        engine.add_event_handler(self.events, self.stop)
        engine.add_event_handler(self.events, self.keep)
        engine.run(batches, max_epochs=1)

    def keep(self, engine: Any) -> None:
        self.numbers[self.heard.step]["loss"] = engine.state.output

    def close(self) -> None:
        self.logger.close()
        self.stop.logger.handlers.clear()
        self.directory.cleanup()


TOOLS = (Stabkit, Underflow, Diagnostics, Ignite)


def installed(tool: type[Tool]) -> bool:
    return importlib.util.find_spec(tool.package) is not None
