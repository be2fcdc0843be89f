"""`stabkit watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stabkit.cli.console import say, screen
from stabkit.cli.options import command
from stabkit.errors import ReportError

_PORT = 6660


@command
def watch(
    run: Annotated[
        Path, typer.Argument(help="The directory of a monitor, there or not yet, or its .jsonl or .csv.", metavar="RUN")
    ],
    port: Annotated[int, typer.Option(help="Of the page on this machine; 0 takes one that is free.")] = _PORT,
) -> None:
    """Show a training run while it goes on, as a page on this machine that refreshes itself; Ctrl+C ends it."""
    from stabkit.monitor.server import serving

    if run.is_file() and run.suffix not in (".jsonl", ".ndjson", ".csv"):
        raise ReportError(f"{run} is no run of a monitor; expected its directory, or its .jsonl or .csv")
    with serving(run, port) as server:
        say(screen(), f"watching {run} at {server.address} (Ctrl+C ends it)")
        server.serve_forever()
