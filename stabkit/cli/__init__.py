"""The command line, one module a command. What a command needs, it imports when it runs.

Exit codes: 0, it ran (and nothing that ``--fail-on`` names was found); 1, ``--fail-on`` found something; 2, it could
not run, or nothing finite could be measured; 130, interrupted; 141, the reader of its output has left (exit_codes.py).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from stabkit._version import __version__
from stabkit.cli import analyze, compare, demo, methods, plan, plot, watch
from stabkit.cli.console import drop_output, is_full, one_of_several
from stabkit.cli.exit_codes import FAILED
from stabkit.cli.imports import in_own_process, quick_imports

app = typer.Typer(
    name="stabkit",
    help="Stability analysis for PyTorch: a deep network read as a numerical integrator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console entry; leaves by ``SystemExit`` with the exit codes above."""
    # Beside a busy neighbour, OpenMP threads that spin while they wait make two threads slower than one. torch reads
    # this when it is imported; a command line may set it, a library may not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    in_own_process()
    if not one_of_several():
        try:
            app()
        except OSError as error:  # of the help and the version; a command tells of its own
            if not is_full(error):
                raise
            drop_output()
            sys.stderr.write(f"error: the output cannot be written: {error.strerror}\n")
            sys.exit(FAILED)
        return
    with quick_imports():
        from stabkit.distributed.ranks import told_to_stop

    try:
        with told_to_stop():
            app()
    except SystemExit as ended:
        _end_rank(ended)
        raise


def _end_rank(ended: SystemExit) -> None:
    """End one of several processes that ``torchrun`` started, without taking its interpreter down.

    Threads of gloo outlive the group they worked for. One that lets go of a tensor while the interpreter is taken down
    aborts the process ("terminate called without an active exception"), and torchrun would call a run failed whose
    report is written.
    """
    if isinstance(ended.code, str):
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended.code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stabkit {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


for _command in (analyze.analyze, compare.compare, plan.plan, plot.plot, methods.methods, demo.demo, watch.watch):
    app.command()(_command)
