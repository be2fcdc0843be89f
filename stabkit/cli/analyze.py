"""`stabkit analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabkit.cli import compare, execution, weights_only
from stabkit.cli.console import FOUND, fail, guarded, progress_bar, say, screen, stdout_to_stderr
from stabkit.cli.execution import Budget, Device, Memory, Probes
from stabkit.cli.options import (
    AllowExport,
    AllowTorchScript,
    Base,
    Cache,
    Debug,
    Depth,
    FactoryArgs,
    FailOn,
    Input,
    Json,
    Key,
    ModelName,
    Recipe,
    Seed,
    Spectrum,
    TrustPickle,
    Weights,
    check_fail_on,
    check_targets,
    is_accused,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.checkpoints import Loaded
    from stabkit.report import Report


def analyze(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A checkpoint file, a Hugging Face or distributed (DCP) directory, or a model name: torchvision:NAME, "
            "timm:NAME, pkg.mod:factory, file.py:factory. Several only with --over-time."
        ),
    ],
    model: ModelName = None,
    input_: Input = None,
    depth: Depth = "auto",
    spectrum: Spectrum = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write report.html, report.json and three pictures here.", metavar="DIR"),
    ] = None,
    json_: Json = None,
    fail_on: FailOn = None,
    over_time: Annotated[
        bool, typer.Option("--over-time", help="Several checkpoints of one training run, in the order of training.")
    ] = False,
    cache: Cache = None,
    device: Device = "cpu",
    probes: Probes = 4,
    budget: Budget = None,
    memory: Memory = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="A Hugging Face directory larger than memory: the weights of one block at a time. With --out, an "
            "interrupted run goes on where it stopped.",
        ),
    ] = False,
    key: Key = None,
    weights: Weights = "raw",
    base: Base = None,
    factory_args: FactoryArgs = None,
    activation: Annotated[
        str, typer.Option(help="Without an architecture: the nonlinearity that expected growth assumes.")
    ] = "relu",
    trust_pickle: TrustPickle = False,
    allow_export: AllowExport = False,
    allow_torchscript: AllowTorchScript = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Say, step by step, what a model's gradients do and why."""
    with guarded(debug):
        from stabkit.errors import StabkitError

        check_fail_on(fail_on)
        check_targets(out, json_)
        recipe = Recipe(
            model=model,
            input=input_,
            base=base,
            key=key,
            weights=weights,
            factory_args=factory_args,
            trust_pickle=trust_pickle,
            allow_export=allow_export,
            allow_torchscript=allow_torchscript,
            depth=depth,
            spectrum=spectrum,
            seed=seed,
        )
        effort = _Effort(device, probes, budget, memory)
        if over_time:
            if stream or effort != _Effort():
                raise StabkitError(
                    "--over-time takes no --device, --probes, --budget, --memory or --stream; leave them out"
                )
            compare.run(source, recipe, over_time=True, out=out, json_=json_, fail_on=fail_on, cache=cache)
            return
        _check_single(source, cache)
        if stream:
            _stream(source[0], recipe, effort, out, json_, fail_on)
        else:
            _one(source[0], recipe, effort, activation, out, json_, fail_on)


@dataclass(frozen=True)
class _Effort:
    """How much is measured, and where."""

    device: str = "cpu"
    probes: int = 4
    budget: str | None = None
    memory: str | None = None


def _check_single(sources: list[str], cache: Path | None) -> None:
    from stabkit.errors import StabkitError

    if len(sources) > 1:
        raise StabkitError(
            f"{len(sources)} sources; for checkpoints of one training run add --over-time, to put any checkpoints of "
            "one model side by side use: stabkit compare"
        )
    if cache is not None:
        raise StabkitError("--cache keeps the checkpoints of a run with --over-time; leave it out")


def _one(
    source: str,
    recipe: Recipe,
    effort: _Effort,
    activation: str,
    out: Path | None,
    json_: str | None,
    fail_on: str | None,
) -> None:
    """A single checkpoint or model."""
    from stabkit import checkpoints

    try:
        with stdout_to_stderr():
            loaded = checkpoints.load(source, **recipe.loading())
    except checkpoints.ArchitectureMissingError as missing:
        if execution.first_rank():
            weights_only.run(missing, activation, recipe.seed, out=out, json_=json_, fail_on=fail_on)
        return
    with stdout_to_stderr():
        report = _analyze(loaded, recipe, effort, keep=out)
    if report is not None:  # another rank reports
        _deliver(report, loaded.description, out, json_, fail_on)


def _stream(
    source: str, recipe: Recipe, effort: _Effort, out: Path | None, json_: str | None, fail_on: str | None
) -> None:
    """A directory larger than memory."""
    from stabkit.errors import StabkitError

    given = {"--model": recipe.model, "--base": recipe.base, "--key": recipe.key, "--factory-args": recipe.factory_args}
    given |= {"--budget": effort.budget, "--memory": effort.memory}
    given |= {"--depth": None if recipe.depth == "auto" else recipe.depth}
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise StabkitError(f"--stream reads a Hugging Face directory block by block; leave out {', '.join(unused)}")
    with stdout_to_stderr(), progress_bar() as progress:
        found = execution.streamed(
            Path(source).expanduser(),
            recipe.input,
            recipe.seed,
            progress,
            device=effort.device,
            probes=effort.probes,
            values=0 if recipe.spectrum == "none" else 1,
            out=out,
        )
    if found is not None:  # another rank reports
        _deliver(found.report(), found.description, out, json_, fail_on)


def _deliver(report: Report, description: str, out: Path | None, json_: str | None, fail_on: str | None) -> None:
    """Print and write the report, and leave by what was found."""
    human = screen(stderr=json_ == "-")
    _print_report(report, description, human)
    if out is not None:
        from stabkit.report import files

        for path in files.save_all(report, out):
            say(human, f"wrote {path}")
    write_json(report.to_dict(), json_, human)
    _leave(report, fail_on)


def _analyze(loaded: Loaded, recipe: Recipe, effort: _Effort, keep: Path | None) -> Report | None:
    from stabkit.errors import CheckpointError

    if loaded.non_finite:
        names = ", ".join(loaded.non_finite[:5])
        more = f" and {len(loaded.non_finite) - 5} more" if len(loaded.non_finite) > 5 else ""
        raise CheckpointError(
            f"{loaded.name}: NaN or infinity in the weights {names}{more}; nothing can be measured. "
            "Give an earlier checkpoint of this run"
        )
    with progress_bar() as progress:
        return execution.analyzed(
            loaded,
            recipe,
            progress,
            device=effort.device,
            probes=effort.probes,
            budget=effort.budget,
            memory=effort.memory,
            keep=keep,
        )


def _print_report(report: Report, description: str, console: Console) -> None:
    from stabkit.report import terminal

    console.print(terminal.plain_text(description, "dim"), highlight=False)
    console.print()
    terminal.show(report, console)


def _leave(report: Report, fail_on: str | None) -> None:
    """Exit by what was found."""
    if any(is_accused(fail_on, finding.kind, finding.severity) for finding in report.findings):
        raise typer.Exit(FOUND)
    if report.verdict == "non-finite":
        fail(f"nothing finite could be measured. {report.summary}", debug=False)
