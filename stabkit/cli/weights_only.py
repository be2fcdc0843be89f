"""`stabkit analyze` of weights whose architecture is not known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from stabkit.cli.console import progress_bar, say
from stabkit.cli.exit_codes import FOUND
from stabkit.errors import StabkitError

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.checkpoints import ArchitectureMissingError
    from stabkit.cli.options import Output
    from stabkit.weights import WeightsReport


def run(missing: ArchitectureMissingError, activation: str, seed: int, output: Output) -> None:
    """Measure the weights alone, and say that this is the weaker statement and how to get the stronger one."""
    from stabkit.meanfield import activation_names
    from stabkit.weights import analyze_weights

    if output.fail_on is not None and not output.accuses("non_finite", "critical"):
        raise StabkitError(
            f"--fail-on {output.fail_on} is a finding about a model, and there are only weights. {missing}"
        )
    if activation not in activation_names():
        raise StabkitError(f"--activation {activation!r}; accepted: {', '.join(activation_names())}")
    human = output.screen()
    stored = missing.weights
    with progress_bar() as progress:
        report = analyze_weights(
            stored.tensors,
            name=stored.name,
            description=stored.description,
            activation=activation,
            seed=seed,
            progress=progress,
        )
    _print(report, str(missing), human)
    if output.out is not None:
        output.out.mkdir(parents=True, exist_ok=True)
        say(human, f"wrote {report.save(output.out / 'weights.json')}")
    output.write_json(report.to_dict())
    if report.non_finite and output.fail_on is not None:
        raise typer.Exit(FOUND)


def _print(report: WeightsReport, advice: str, console: Console) -> None:
    from rich.table import Table

    from stabkit.report.terminal import plain_text
    from stabkit.weights.report import legend, rows, summary

    console.print(plain_text(report.description, "dim"), highlight=False)
    console.print()
    console.print(plain_text(f"{report.name}: WEIGHTS ONLY", "bold yellow"))
    for line in (summary(report), report.label):
        console.print(plain_text(line), highlight=False)
    titles, *cells = rows(report, console.width)
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, title in enumerate(titles):
        shown.add_column(title, justify="left" if i < 3 else "right", no_wrap=True)
    for row in cells:
        shown.add_row(*(plain_text(cell) for cell in row))
    console.print()
    console.print(shown)
    console.print()
    for line in (legend(report), advice):
        console.print(plain_text(line, "dim"), highlight=False)
