"""`stabkit analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabkit.cli import compare, weights_only
from stabkit.cli.console import FOUND, fail, guarded, progress_bar, say, screen, stdout_to_stderr
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
        if over_time:
            compare.run(source, recipe, over_time=True, out=out, json_=json_, fail_on=fail_on, cache=cache)
            return
        _one(source, recipe, activation, out, json_, fail_on, cache)


def _one(
    sources: list[str],
    recipe: Recipe,
    activation: str,
    out: Path | None,
    json_: str | None,
    fail_on: str | None,
    cache: Path | None,
) -> None:
    """A single checkpoint or model."""
    from stabkit import checkpoints
    from stabkit.errors import StabkitError

    if len(sources) > 1:
        raise StabkitError(
            f"{len(sources)} sources; for checkpoints of one training run add --over-time, to put any checkpoints of "
            "one model side by side use: stabkit compare"
        )
    if cache is not None:
        raise StabkitError("--cache keeps the checkpoints of a run with --over-time; leave it out")
    human = screen(stderr=json_ == "-")
    try:
        with stdout_to_stderr():
            loaded = checkpoints.load(sources[0], **recipe.loading())
    except checkpoints.ArchitectureMissingError as missing:
        weights_only.run(missing, activation, recipe.seed, out=out, json_=json_, fail_on=fail_on)
        return
    with stdout_to_stderr():
        report = _analyze(loaded, recipe)
    _print_report(report, loaded, human)
    if out is not None:
        from stabkit.report import files

        for path in files.save_all(report, out):
            say(human, f"wrote {path}")
    write_json(report.to_dict(), json_, human)
    _leave(report, fail_on)


def _analyze(loaded: Loaded, recipe: Recipe) -> Report:
    from stabkit.analysis import analyze as run
    from stabkit.errors import CheckpointError

    if loaded.non_finite:
        names = ", ".join(loaded.non_finite[:5])
        more = f" and {len(loaded.non_finite) - 5} more" if len(loaded.non_finite) > 5 else ""
        raise CheckpointError(
            f"{loaded.name}: NaN or infinity in the weights {names}{more}; nothing can be measured. "
            "Give an earlier checkpoint of this run"
        )
    with progress_bar() as progress:
        return run(
            loaded.model,
            *loaded.inputs,
            kwargs=loaded.kwargs,
            loss=loaded.loss,
            name=loaded.name,
            progress=progress,
            **recipe.analysing(),
        )


def _print_report(report: Report, loaded: Loaded, console: Console) -> None:
    from stabkit.report import terminal

    console.print(terminal.plain_text(loaded.description, "dim"), highlight=False)
    console.print()
    terminal.show(report, console)


def _leave(report: Report, fail_on: str | None) -> None:
    """Exit by what was found."""
    if any(is_accused(fail_on, finding.kind, finding.severity) for finding in report.findings):
        raise typer.Exit(FOUND)
    if report.verdict == "non-finite":
        fail(f"nothing finite could be measured. {report.summary}", debug=False)
