"""`stabkit plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from stabkit.cli.console import stdout_to_stderr
from stabkit.cli.execution import first_rank, planned
from stabkit.cli.exit_codes import FOUND
from stabkit.cli.options import Effort, JsonOutput, Recipe, command


@command
def plan(
    source: Annotated[str, typer.Argument(help="A checkpoint file or directory, or a model name, as for analyze.")],
    recipe: Recipe,
    effort: Effort,
    output: JsonOutput,
) -> None:
    """Say what an analysis will cost, before it is run; leave with 1 when none keeps the budget."""
    output.check()
    if not first_rank():
        return
    with stdout_to_stderr():
        found = planned(recipe.load(source), recipe, effort)
    output.screen().print(str(found), highlight=False, markup=False, soft_wrap=True)
    output.write_json(found.to_dict())
    if not found.fits:
        raise typer.Exit(FOUND)
