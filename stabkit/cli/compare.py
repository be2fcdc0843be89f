"""`stabkit compare`, and `stabkit analyze --over-time`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabkit.cli.console import FAILED, FOUND, guarded, progress_bar, say, screen, stdout_to_stderr
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

    from stabkit.comparison import Comparison

CACHE = ".stabkit"


def compare(
    sources: Annotated[list[str], typer.Argument(help="Checkpoints of one model, or model names; at least two.")],
    model: ModelName = None,
    input_: Input = None,
    depth: Depth = "auto",
    spectrum: Spectrum = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write comparison.html, .json, .csv and .png here.", metavar="DIR"),
    ] = None,
    json_: Json = None,
    fail_on: FailOn = None,
    cache: Cache = None,
    key: Key = None,
    weights: Weights = "raw",
    base: Base = None,
    factory_args: FactoryArgs = None,
    trust_pickle: TrustPickle = False,
    allow_export: AllowExport = False,
    allow_torchscript: AllowTorchScript = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Put the same model at several checkpoints side by side."""
    with guarded(debug):
        from stabkit.errors import StabkitError

        check_fail_on(fail_on)
        check_targets(out, json_)
        if len(sources) < 2:
            raise StabkitError("compare needs at least two checkpoints; for one use: stabkit analyze")
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
        run(sources, recipe, over_time=False, out=out, json_=json_, fail_on=fail_on, cache=cache)


def run(
    sources: list[str],
    recipe: Recipe,
    *,
    over_time: bool,
    out: Path | None,
    json_: str | None,
    fail_on: str | None,
    cache: Path | None,
) -> None:
    """Analyse, show and write; exit code 1 when ``fail_on`` names a finding, 2 when a checkpoint could not be read."""
    from stabkit.comparison import compare as compared
    from stabkit.distributed import session

    human = screen(stderr=json_ == "-")
    folder = cache if cache is not None or out is None else out / CACHE
    with session() as ranks, stdout_to_stderr(), progress_bar() as progress:
        options = {**recipe.loading(), **recipe.analysing()}
        shown = progress if ranks.first else None
        found = compared(sources, over_time=over_time, cache=folder, progress=shown, **options)
    if not ranks.first:  # another rank reports
        return
    _print(found, human)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("comparison.html", "comparison.json", "comparison.csv", "comparison.png"):
            say(human, f"wrote {found.save(out / name)}")
    write_json(found.to_dict(), json_, human)
    _leave(found, fail_on, screen(stderr=True))


def _print(found: Comparison, console: Console) -> None:
    from rich.table import Table

    from stabkit.comparison import table
    from stabkit.report.terminal import plain_text

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    titles, *rows = table.fitted(found, console.width)
    for title in titles:
        shown.add_column(title, justify="left" if title in table.LEFT else "right")
    for row in rows:
        shown.add_row(*(plain_text(cell) for cell in row))
    console.print(shown)
    console.print()
    for line in found.changes:
        console.print(plain_text(line), highlight=False)
    cached = sum(snapshot.cached for snapshot in found.snapshots)
    notes = [*found.notes, *([f"{cached} of {len(found.snapshots)} taken from the cache"] if cached else [])]
    for line in (*notes, table.legend()):
        console.print(plain_text(line, "dim"), highlight=False)


def _leave(found: Comparison, fail_on: str | None, errors: Console) -> None:
    failed = [snapshot for snapshot in found.snapshots if snapshot.state == "failed"]
    for snapshot in failed:
        say(errors, f"error: {snapshot.message}")
    if failed:
        raise typer.Exit(FAILED)
    accused = any(
        is_accused(fail_on, finding.kind, finding.severity)
        for snapshot in found.analysed
        if snapshot.report is not None
        for finding in snapshot.report.findings
    )
    broken = any(snapshot.state == "non-finite" for snapshot in found.snapshots)
    if accused or (broken and is_accused(fail_on, "non_finite", "critical")):
        raise typer.Exit(FOUND)
