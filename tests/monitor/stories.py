"""Blow-ups from the first bad step to the replay, in three loops: python -m tests.monitor.stories [FAULT ...]

A small network on digits is trained in a plain loop, by Lightning and by the Hugging Face Trainer; in the middle the
learning rate is multiplied by 100, one batch is poisoned, or a layer's gradients are so large from a step on that they
are infinite in float16 and a scaler halves its scale again and again. In a network of attention queries and keys grow
by a third at every step, and in another the logits of the loss are shifted by more and more. A line tells how many
training steps later the first finding came, what it is, whether it, or what came within three steps, names what was
done, what stood on stderr, and what became of the capsule.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stabkit
from stabkit.checkpoints import load
from stabkit.monitor import Monitor, replay

AT, STEPS, FACTOR = 63, 93, 100.0  # no step that is recorded or looked at anyway
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
}
FAULTS = ("rate", "poisoned", "nan", "scaler", "attention", "logits")
GROWTH = 1.35  # of the weights of queries and keys, by a step


class Network(nn.Module):
    """An MLP that returns its loss as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Attends(nn.Module):
    """Attention over the rows of a digit; returns its loss as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 32)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True) for _ in range(3)]
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(x.unflatten(1, (8, 8)))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x.mean(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def _from_the_fault_on(model: nn.Module, harm: Callable[[int], None]) -> Any:
    """Do harm before every training call of a model that follows ``AT`` of them, given how many have."""
    calls = [0]

    def before(*_: Any) -> None:
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] > AT:
                with torch.no_grad():
                    harm(calls[0] - AT)

    return model.register_forward_pre_hook(before)


def grow(model: nn.Module) -> Any:
    """What makes queries and keys of the second layer grow, as a weight decay of the wrong sign does."""
    return _from_the_fault_on(model, lambda _: model.layers[1].self_attn.in_proj_weight[:64].mul_(GROWTH))


def shift(model: nn.Module) -> Any:
    """What adds to all logits of the loss, of which its softmax takes no notice, nearly twice as much at every step."""
    return _from_the_fault_on(model, lambda count: model.head.bias.add_(4.0 * GROWTH ** (2 * count)))


def blow_up(model: nn.Module, at: int = AT) -> Any:
    """What makes the gradients of the third layer a thousand million times as large, as a wrong backward does."""
    calls = [0]

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            calls[0] += 1
            if calls[0] > at:
                output.register_hook(lambda gradient: gradient * 1e9)

    return model.layers[2].register_forward_hook(after)


SPOIL: dict[str, Callable[[nn.Module], Any]] = {"attention": grow, "logits": shift, "scaler": blow_up}


class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Digits, sample by sample; from one on the values are spoiled."""

    def __init__(self, fault: str, size: int = 32) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.x = torch.tensor(x / 16.0, dtype=torch.float32)[order].repeat(2, 1)[: STEPS * size].clone()
        self.y = torch.tensor(y)[order].repeat(2)[: STEPS * size].clone()
        bad = slice(AT * size, (AT + 1) * size)
        if fault == "poisoned":
            self.x[bad] *= 1e4
        if fault == "nan":
            self.x[AT * size + 3, 5] = torch.nan

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


def schedule(optimizer: torch.optim.Optimizer, fault: str) -> torch.optim.lr_scheduler.LambdaLR:
    """A constant rate, raised in the middle where that is the fault."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: FACTOR if fault == "rate" and t >= AT else 1.0)


def plain(model: Network, optimizer: torch.optim.Optimizer, fault: str, options: dict[str, Any]) -> Monitor:
    """A loop written by hand."""
    rates = schedule(optimizer, fault)
    scaler = torch.amp.GradScaler("cpu", enabled=fault == "scaler", growth_interval=20)
    with Monitor(model, optimizer=optimizer, scaler=scaler, **options) as monitor:
        for batch in torch.utils.data.DataLoader(Batches(fault), 32):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=fault == "scaler"):
                loss = model(**batch)["loss"]
            scaler.scale(loss).backward()
            monitor.step(loss)
            scaler.step(optimizer)
            scaler.update()
            rates.step()
    return monitor


def lightning(model: Network, optimizer: torch.optim.Optimizer, fault: str, options: dict[str, Any]) -> Monitor:
    """A Lightning run."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return [optimizer], [{"scheduler": schedule(optimizer, fault), "interval": "step"}]

    callback = stabkit.MonitorCallback("net", **options)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Batches(fault), 32))
    assert callback.monitor is not None
    return callback.monitor


def hugging_face(model: Network, optimizer: torch.optim.Optimizer, fault: str, options: dict[str, Any]) -> Monitor:
    """A run of the Trainer, which clips no gradient here."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Batches(fault))

    arguments = transformers.TrainingArguments(
        output_dir=str(options["directory"]),
        per_device_train_batch_size=32,
        num_train_epochs=1,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    callback = stabkit.TrainerCallback(**options)
    both = (optimizer, schedule(optimizer, fault))
    InOrder(model, arguments, train_dataset=Batches(fault), callbacks=[callback], optimizers=both).train()
    assert callback.monitor is not None
    return callback.monitor


LOOPS = {"plain": plain, "Lightning": lightning, "Trainer": hugging_face}
NAMES = {
    "rate": "learning rate",
    "poisoned": "batch",
    "nan": "batch",
    "scaler": "loss scale",
    "attention": "attention logit",
    "logits": "log of the softmax normaliser",
}


def told(loop: str, optimizer: str, fault: str, every: int) -> dict[str, Any]:
    """What became of one run."""
    build = Attends if fault == "attention" else Network
    model = build()
    undo = SPOIL[fault](model) if fault in SPOIL else None
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logger = logging.getLogger("stabkit.monitor")
    logger.addHandler(handler)
    logger.propagate = False
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        options = {"every": every, "directory": Path(directory), "writers": []}
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                monitor = LOOPS[loop](model, OPTIMIZERS[optimizer](model.parameters()), fault, options)
        finally:
            logger.removeHandler(handler)
            logger.propagate = True
        if undo is not None:
            undo.remove()
        lines = heard.getvalue().splitlines()
        first = monitor.findings[0] if monitor.findings else None
        step = int(re.search(r"training step (\d+)", lines[0])[1]) if lines else -1  # type: ignore[index]
        soon = [f for f in monitor.findings if f is first or f.numbers.get("training_step", AT + 9) <= AT + 3]
        words = " ".join(f"{finding.evidence} {finding.remedy}" for finding in soon)
        row = {
            "later": step - AT,
            "kind": "nothing" if first is None else first.kind,
            "named": NAMES[fault] in words,
            "lines": len(lines),
            "replays": False,
            "good": False,
            "analysis": "",
        }
        if monitor.capsules:
            path = monitor.capsules[0]
            again = build()
            if fault == "scaler":
                blow_up(again, 0)  # the fault is in the code of the model
            row["replays"] = replay(path, again).agrees(1e-3 if fault == "scaler" else 1e-5)  # in half precision
            loaded = load(path, model=build)
            row["good"] = "the last good ones" in loaded.description
            report = stabkit.analyze(loaded.model, *loaded.inputs, spectrum="none", kwargs=loaded.kwargs)
            said = NAMES[fault] in loaded.description or any(finding.module_path for finding in report.findings)
            row["analysis"] = f"{report.verdict}, {'names it' if said else 'names nothing'}"
    return row


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("fault     loop       optimizer  every  later  first finding     named  lines  replays  last good  ", end="")
    print("analysis")
    for fault in sys.argv[1:] or FAULTS:
        for loop in LOOPS if fault != "scaler" else ("plain",):  # the others have scalers on a GPU alone
            for optimizer in OPTIMIZERS:
                for every in (1, 10, 50):
                    row = told(loop, optimizer, fault, every)
                    print(
                        f"{fault:9s} {loop:10s} {optimizer:9s} {every:6d} {row['later']:6d}  {row['kind']:16s} "
                        f"{row['named']!s:6s} {row['lines']:5d}  {row['replays']!s:8s} {row['good']!s:10s} "
                        f"{row['analysis']}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
