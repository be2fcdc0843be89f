"""The command line. Only typer is imported here: what a command needs, it imports when it runs.

Exit codes: 0, it ran (and nothing that ``--fail-on`` names was found); 1, ``--fail-on`` found something; 2, it could
not run, or nothing finite could be measured; 130, interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from stabkit._version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.checkpoints import Loaded
    from stabkit.report import Report

FOUND, FAILED, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
PLOTS = ("region", "growth", "gradients", "overview")

app = typer.Typer(
    name="stabkit",
    help="Stability analysis for PyTorch: a deep network read as a numerical integrator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


def main() -> None:
    """The console entry; leaves by ``SystemExit`` with the exit codes above."""
    # Beside a busy neighbour, OpenMP threads that spin while they wait make two threads slower than one. torch reads
    # this when it is imported; a command line may set it, a library may not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


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


@app.command()
def analyze(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint file, a Hugging Face directory, or a model name: torchvision:NAME, timm:NAME, "
            "pkg.mod:factory, file.py:factory."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The architecture of a state dict: a model name as above.", metavar="NAME")
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option("--input", help="A shape (1x3x64x64), tokens:1x8, or a .npy or .pt file.", metavar="SHAPE|FILE"),
    ] = None,
    depth: Annotated[
        str, typer.Option(help="Where steps end: auto, cuts, modules, or module paths and globs, comma-separated.")
    ] = "auto",
    spectrum: Annotated[
        str, typer.Option(help="Which eigenvalues: auto, dense (all), krylov (the largest), none.", metavar="HOW")
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write report.json, region.png, growth.png and gradients.png here.", metavar="DIR"),
    ] = None,
    json_: Annotated[
        str | None,
        typer.Option("--json", help="Write the report as JSON to a file; - is standard output.", metavar="FILE|-"),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="Exit with 1 on a finding of this kind (exploding, vanishing, non_finite) or of at least this "
            "severity (info, warning, critical). Without it, findings do not change the exit code.",
            metavar="KIND|SEVERITY",
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Where the weights are in the file.")] = None,
    weights: Annotated[str, typer.Option(help="raw or ema, when the file has both.")] = "raw",
    factory_args: Annotated[
        str | None, typer.Option(help="Keyword arguments of the factory, a JSON object.", metavar="JSON")
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle whatever the file asks for, which runs its code.")
    ] = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Say, step by step, what a model's gradients do and why."""
    with _guarded(debug):
        _check_fail_on(fail_on)
        _check_targets(out, json_)
        human = _console(stderr=json_ == "-")
        with _stdout_to_stderr():
            from stabkit import checkpoints

            loaded = checkpoints.load(
                source,
                model=model,
                input=input_,
                key=key,
                weights=weights,
                factory_args=_json_object("--factory-args", factory_args),
                trust_pickle=trust_pickle,
                seed=seed,
            )
            report = _analyze(loaded, depth, spectrum, seed)
        _print_report(report, loaded, human)
        _write_report(report, out, json_, human)
        _leave(report, fail_on)


def _analyze(loaded: Loaded, depth: str, spectrum: str, seed: int) -> Report:
    from stabkit.analysis import analyze as run
    from stabkit.errors import CheckpointError

    if loaded.non_finite:
        names = ", ".join(loaded.non_finite[:5])
        more = f" and {len(loaded.non_finite) - 5} more" if len(loaded.non_finite) > 5 else ""
        raise CheckpointError(
            f"{loaded.name}: NaN or infinity in the weights {names}{more}; nothing can be measured. "
            "Give an earlier checkpoint of this run"
        )
    where: str | list[str] = depth
    if depth not in ("auto", "cuts", "modules"):
        where = [part.strip() for part in depth.split(",")]
    with _progress() as progress:
        return run(
            loaded.model,
            *loaded.inputs,
            kwargs=loaded.kwargs,
            depth=where,
            spectrum=spectrum,
            seed=seed,
            name=loaded.name,
            progress=progress,
        )


def _print_report(report: Report, loaded: Loaded, console: Console) -> None:
    from stabkit.report import terminal

    console.print(terminal.plain_text(loaded.description, "dim"), highlight=False)
    console.print()
    terminal.show(report, console)


def _write_report(report: Report, out: Path | None, json_: str | None, console: Console) -> None:
    from stabkit.report import encoding, files

    text = encoding.lines(report.to_dict())
    if out is not None:
        for path in files.save_all(report, out):
            _say(console, f"wrote {path}")
    if json_ == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    elif json_ is not None:
        _say(console, f"wrote {files.write(Path(json_), text.encode())}")


def _leave(report: Report, fail_on: str | None) -> None:
    """Exit by what was found."""
    from stabkit.report.schema import SEVERITIES

    wanted = None if fail_on is None else fail_on.replace("-", "_")
    for finding in report.findings:
        if wanted == finding.kind:
            raise typer.Exit(FOUND)
        if wanted in SEVERITIES and SEVERITIES.index(finding.severity) >= SEVERITIES.index(wanted):
            raise typer.Exit(FOUND)
    if report.verdict == "non-finite":
        _fail(f"nothing finite could be measured. {report.summary}", debug=False)


@app.command()
def plot(
    report: Annotated[Path, typer.Argument(help="A report.json that analyze wrote.")],
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(PLOTS)}.")],
    out: Annotated[
        Path | None, typer.Option(help="A .png, .svg or .pdf file; KIND.png by default.", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a saved report."""
    with _guarded(debug):
        from stabkit import plotting
        from stabkit.errors import ReportError
        from stabkit.report import Report, files

        if kind not in PLOTS:
            raise ReportError(f"no plot is called {kind!r}; there are: {', '.join(PLOTS)}")
        drawn: Any = getattr(plotting, kind)(Report.load(report))
        figure = drawn if kind == "overview" else plotting.figure_of(drawn)
        _say(_console(), f"wrote {files.write_figure(figure, out or Path(f'{kind}.png'))}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method; all of them without it.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the method's stability region into this file.", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the integrators, or describe one."""
    with _guarded(debug):
        from stabkit import integrators
        from stabkit.errors import StabkitError
        from stabkit.report import catalogue, files

        if name is None:
            if plot is not None:
                raise StabkitError("--plot needs the NAME of a method: stabkit methods rk4 --plot rk4.png")
            _console().print(catalogue.overview())
            return
        method = integrators.named(name)
        _console().print(catalogue.details(method), highlight=False)
        if plot is not None:
            from stabkit import plotting

            _say(_console(), f"wrote {files.write_figure(plotting.figure_of(plotting.method(method)), plot)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where checkpoints, reports and pictures go.", metavar="DIR")] = Path(
        "stabkit-demo"
    ),
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train two networks on digits and analyse both."""
    with _guarded(debug):
        from stabkit import demo as embedded

        embedded.run(out, seed, _console(), _console(stderr=True))


@contextmanager
def _guarded(debug: bool) -> Iterator[None]:
    """One clear message and an exit code for everything that can go wrong."""
    from stabkit.errors import StabkitError

    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _fail("interrupted", debug=False, code=INTERRUPTED)
    except BrokenPipeError:
        # the reader of a pipe has left: no message can reach it, and closing must not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except StabkitError as error:
        _fail(str(error), debug)
    except SystemExit as error:
        _fail(f"the code of the model left the program with exit code {error.code!r}", debug)
    except Exception as error:
        hint = "" if debug else "; run again with --debug for the traceback"
        _fail(f"unexpected {type(error).__name__}: {error}{hint}", debug)


def _fail(message: str, debug: bool, code: int = FAILED) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exc()
    from rich.text import Text

    from stabkit.report.terminal import plain_text

    line = Text.assemble(("error: ", "bold red"), plain_text(message))
    _console(stderr=True).print(line, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, emoji=False)


def _say(console: Console, message: str) -> None:
    from stabkit.report.terminal import plain_text

    console.print(plain_text(message), highlight=False, soft_wrap=True)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What a model prints must not mix with the report."""
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on standard error, on a terminal only; yields ``progress(done, total, name)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from stabkit.report.tables import printable

    console = _console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tracing", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(name)[:40])

        yield progress


def _json_object(option: str, text: str | None) -> dict[str, Any]:
    import json

    from stabkit.errors import StabkitError

    if text is None:
        return {}
    accepted = "expected an object such as '{\"depth\": 8}'"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StabkitError(f"{option} {text!r} is not JSON ({error}); {accepted}") from None
    if not isinstance(value, dict):
        raise StabkitError(f"{option} {text!r} is a {type(value).__name__}; {accepted}")
    return value


def _check_fail_on(wanted: str | None) -> None:
    """A misspelt word would never be found, and so never fail."""
    import difflib

    from stabkit.errors import StabkitError
    from stabkit.report.schema import FINDINGS, SEVERITIES

    accepted = (*SEVERITIES, *FINDINGS)
    if wanted is None or wanted.replace("-", "_") in accepted:
        return
    near = difflib.get_close_matches(wanted, accepted, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise StabkitError(f"--fail-on {wanted!r}; accepted: {', '.join(accepted)}{guess}")


def _check_targets(out: Path | None, json_: str | None) -> None:
    """Say before a long analysis that its result would have nowhere to go."""
    from stabkit.errors import ReportError

    if out is not None and out.exists() and not out.is_dir():
        raise ReportError(f"--out {out} is a file; name a directory")
    if json_ not in (None, "-") and not Path(str(json_)).absolute().parent.is_dir():
        raise ReportError(f"--json {json_}: the directory does not exist; create it first")
