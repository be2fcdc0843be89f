"""What a command says: messages, errors, a progress bar."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from stabkit.cli.exit_codes import FAILED, INTERRUPTED, PIPE_CLOSED
from stabkit.errors import StabkitError
from stabkit.text import printable

if TYPE_CHECKING:
    from rich.console import Console


def one_of_several() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """One clear message and an exit code for everything that can go wrong."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        fail("interrupted", debug=False, code=INTERRUPTED)
    except BrokenPipeError:
        drop_output()  # the reader of a pipe has left: no message can reach it
        raise typer.Exit(PIPE_CLOSED) from None
    except MemoryError:
        fail_plainly("out of memory; give a smaller input, or --budget, or --stream for a directory of weights")
    except StabkitError as error:
        fail(str(error), debug)
    except SystemExit as error:
        fail(f"the code of the model left the program with exit code {error.code!r}", debug)
    except OSError as error:
        if not is_full(error):
            fail(f"unexpected {type(error).__name__}: {error}{_hint(debug)}", debug)
        drop_output()
        fail_plainly(f"the output cannot be written: {error.strerror}")
    except Exception as error:
        fail(f"unexpected {type(error).__name__}: {error}{_hint(debug)}", debug)


def _hint(debug: bool) -> str:
    return "" if debug else "; run again with --debug for the traceback"


def is_full(error: OSError) -> bool:
    """Whether there is no room where something was written to a stream that was open already."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def drop_output() -> None:
    """Nothing more is written to standard output: closing it must not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail_plainly(message: str) -> NoReturn:
    """As `fail`, with what is loaded already: there may be no memory for more."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"error: {printable(message)}\n".encode(errors="replace"))
    raise typer.Exit(FAILED)


def fail(message: str, debug: bool, code: int = FAILED) -> NoReturn:
    """Print one line to standard error and leave with an exit code."""
    if one_of_several():
        # torchrun tells the others to stop a tenth of a second after one has failed, and kills them 30 s later: the
        # reason may be on its way here by then, and the imports below take longer
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if debug:
        import traceback

        traceback.print_exc()
    try:
        from rich.text import Text

        from stabkit.report.terminal import plain_text
    except (MemoryError, ImportError):  # a library that finds no room does not load
        fail_plainly(message)

    line = Text.assemble(("error: ", "bold red"), plain_text(message))
    screen(stderr=True).print(line, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def screen(stderr: bool = False) -> Console:
    """The terminal, or the pipe in its place."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would leave by SystemExit, as if the user's code had

    return Screen(stderr=stderr, emoji=False)


def say(console: Console, message: str) -> None:
    """Print a line as it is: nothing in it is markup or a control code."""
    from stabkit.report.terminal import plain_text

    console.print(plain_text(message), highlight=False, soft_wrap=True)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What a model prints must not mix with the report."""
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on standard error, on a terminal only; yields ``progress(done, total, name)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = screen(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tracing", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(name)[:40])

        yield progress
