"""`stabkit compare`, and `stabkit analyze --over-time`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabkit.cli.console import progress_bar, say, screen, stdout_to_stderr
from stabkit.cli.exit_codes import FAILED, FOUND
from stabkit.cli.options import Cache, Output, Recipe, command
from stabkit.errors import StabkitError

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.comparison import Comparison

CACHE = ".stabkit"


@command
def compare(
    sources: Annotated[list[str], typer.Argument(help="Checkpoints of one model, or model names; at least two.")],
    recipe: Recipe,
    output: Output,
    cache: Cache = None,
) -> None:
    """Put the same model at several checkpoints side by side."""
    output.check()
    if len(sources) < 2:
        raise StabkitError("compare needs at least two checkpoints; for one use: stabkit analyze")
    run(sources, recipe, output, over_time=False, cache=cache)


def run(sources: list[str], recipe: Recipe, output: Output, *, over_time: bool, cache: Path | None) -> None:
    """Analyse, show and write; exit code 1 when ``--fail-on`` names a finding, 2 when a checkpoint is not readable."""
    from stabkit.comparison import compare as compared
    from stabkit.distributed import session

    human = output.screen()
    folder = cache if cache is not None or output.out is None else output.out / CACHE
    with session() as ranks, stdout_to_stderr(), progress_bar() as progress:
        options = {**recipe.loading(), **recipe.analysing()}
        shown = progress if ranks.first else None
        found = compared(sources, over_time=over_time, cache=folder, progress=shown, **options)
    if not ranks.first:  # another rank reports
        return
    _print(found, human)
    if output.out is not None:
        output.out.mkdir(parents=True, exist_ok=True)
        for name in ("comparison.html", "comparison.json", "comparison.csv", "comparison.png"):
            say(human, f"wrote {found.save(output.out / name)}")
    output.write_json(found.to_dict())
    _leave(found, output, screen(stderr=True))


def _print(found: Comparison, console: Console) -> None:
    from rich.table import Table

    from stabkit.comparison.result import LEFT, fitted, legend
    from stabkit.report.terminal import plain_text

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    titles, *rows = fitted(found, console.width)
    for title in titles:
        shown.add_column(title, justify="left" if title in LEFT else "right")
    for row in rows:
        shown.add_row(*(plain_text(cell) for cell in row))
    console.print(shown)
    console.print()
    for line in found.changes:
        console.print(plain_text(line), highlight=False)
    cached = sum(snapshot.cached for snapshot in found.snapshots)
    notes = [*found.notes, *([f"{cached} of {len(found.snapshots)} taken from the cache"] if cached else [])]
    for line in (*notes, legend()):
        console.print(plain_text(line, "dim"), highlight=False)


def _leave(found: Comparison, output: Output, errors: Console) -> None:
    failed = [snapshot for snapshot in found.snapshots if snapshot.state == "failed"]
    for snapshot in failed:
        say(errors, f"error: {snapshot.message}")
    if failed:
        raise typer.Exit(FAILED)
    accused = any(
        output.accuses(finding.kind, finding.severity)
        for snapshot in found.analysed
        if snapshot.report is not None
        for finding in snapshot.report.findings
    )
    broken = any(snapshot.state == "non-finite" for snapshot in found.snapshots)
    if accused or (broken and output.accuses("non_finite", "critical")):
        raise typer.Exit(FOUND)
