"""`stabkit methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stabkit.cli.console import say, screen
from stabkit.cli.options import command
from stabkit.errors import StabkitError


@command
def methods(
    name: Annotated[str | None, typer.Argument(help="A method; all of them without it.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the method's stability region into this file.", metavar="FILE")
    ] = None,
) -> None:
    """List the integrators, or describe one."""
    from stabkit import integrators
    from stabkit.report import catalogue, files

    if name is None:
        if plot is not None:
            raise StabkitError("--plot needs the NAME of a method: stabkit methods rk4 --plot rk4.png")
        screen().print(catalogue.overview())
        return
    method = integrators.named(name)
    screen().print(catalogue.details(method), highlight=False)
    if plot is not None:
        from stabkit import plotting

        say(screen(), f"wrote {files.write_figure(plotting.figure_of(plotting.method(method)), plot)}")
