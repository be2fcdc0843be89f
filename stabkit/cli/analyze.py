"""`stabkit analyze`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabkit.cli import compare, execution, weights_only
from stabkit.cli.console import fail, progress_bar, say, stdout_to_stderr
from stabkit.cli.exit_codes import FOUND
from stabkit.cli.imports import quick_imports
from stabkit.cli.live import Live
from stabkit.cli.options import Cache, Device, Effort, Output, Recipe, command, given
from stabkit.cli.training import Training
from stabkit.errors import CheckpointError, StabkitError

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.checkpoints import Loaded
    from stabkit.report import Report


@command
def analyze(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A checkpoint file, a Hugging Face or distributed (DCP) directory, or a model name: torchvision:NAME, "
            "timm:NAME, pkg.mod:factory, file.py:factory. Several only with --over-time."
        ),
    ],
    recipe: Recipe,
    output: Output,
    effort: Effort,
    training: Training,
    device: Device = "cpu",
    over_time: Annotated[
        bool, typer.Option("--over-time", help="Several checkpoints of one training run, in the order of training.")
    ] = False,
    cache: Cache = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="A Hugging Face directory larger than memory: the weights of one block at a time. With --out, an "
            "interrupted run goes on where it stopped.",
        ),
    ] = False,
    activation: Annotated[
        str, typer.Option(help="Without an architecture: the nonlinearity that expected growth assumes.")
    ] = "relu",
) -> None:
    """Say, step by step, what a model's gradients do and why."""
    output.check()
    training.check()
    if over_time:
        if stream or effort != Effort() or training != Training() or device != "cpu":
            raise StabkitError(
                "--over-time takes no --device, --probes, --budget, --memory, --loss, --labels, --optimizer, "
                "--schedule or --stream; leave them out"
            )
        compare.run(source, recipe, output, over_time=True, cache=cache)
        return
    if len(source) > 1:
        raise StabkitError(
            f"{len(source)} sources; for checkpoints of one training run add --over-time, to put any checkpoints of "
            "one model side by side use: stabkit compare"
        )
    if cache is not None:
        raise StabkitError("--cache keeps the checkpoints of a run with --over-time; leave it out")
    if stream:
        _stream(source[0], recipe, effort, training, device, output)
    else:
        _one(source[0], recipe, effort, training, device, activation, output)


def _one(
    source: str, recipe: Recipe, effort: Effort, training: Training, device: str, activation: str, output: Output
) -> None:
    """A single checkpoint or model."""
    with quick_imports():
        from stabkit import checkpoints

    try:
        with stdout_to_stderr():
            loaded = recipe.load(source)
    except checkpoints.ArchitectureMissingError as missing:
        if training != Training():
            raise
        if execution.first_rank():
            weights_only.run(missing, activation, recipe.seed, output)
        return
    _check_finite(loaded)
    loss = training.loss_of(loaded.loss)
    human = output.screen()
    with contextlib.ExitStack() as stack:
        live = Live(loaded, human) if execution.first_rank() else None
        stack.enter_context(stdout_to_stderr())
        if live is not None:
            stack.enter_context(live)
        report = execution.analyzed(
            dataclasses.replace(loaded, loss=loss), recipe, effort, live, training=training, device=device,
            keep=output.out,
        )  # fmt: skip
    if report is not None:  # another rank reports
        from stabkit.report import terminal

        human.print(terminal.details(report, human.width), highlight=False)
        _deliver(report, output, human)


def _stream(source: str, recipe: Recipe, effort: Effort, training: Training, device: str, output: Output) -> None:
    """A directory larger than memory."""
    unused = [*given(recipe, but=("input", "seed", "spectrum")), *given(effort, but=("probes",)), *given(training)]
    if unused:
        raise StabkitError(f"--stream reads a Hugging Face directory block by block; leave out {', '.join(unused)}")
    with stdout_to_stderr(), progress_bar() as progress:
        found = execution.streamed(Path(source).expanduser(), recipe, effort, progress, device=device, out=output.out)
    if found is not None:  # another rank reports
        from stabkit.report import terminal

        human, report = output.screen(), found.report()
        human.print(terminal.plain_text(found.description, "dim"), highlight=False)
        human.print()
        terminal.show(report, human)
        _deliver(report, output, human)


def _check_finite(loaded: Loaded) -> None:
    if loaded.non_finite:
        names = ", ".join(loaded.non_finite[:5])
        more = f" and {len(loaded.non_finite) - 5} more" if len(loaded.non_finite) > 5 else ""
        raise CheckpointError(
            f"{loaded.name}: NaN or infinity in the weights {names}{more}; nothing can be measured. "
            "Give an earlier checkpoint of this run"
        )


def _deliver(report: Report, output: Output, human: Console) -> None:
    """Write the report, and leave by what was found."""
    if output.out is not None:
        from stabkit.report import files

        for path in files.save_all(report, output.out):
            say(human, f"wrote {path}")
    output.write_json(report.to_dict())
    if any(output.accuses(finding.kind, finding.severity) for finding in report.findings):
        raise typer.Exit(FOUND)
    if report.verdict == "non-finite":
        fail(f"nothing finite could be measured. {report.summary}", debug=False)
