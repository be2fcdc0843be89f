"""`stabkit plot`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.cli.console import say, screen, stdout_to_stderr
from stabkit.cli.options import Loading, command

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from stabkit.checkpoints import Loaded

# what is drawn of a report (of a model by analysing it), of the records of a monitor, and of a model that is run again
OF_REPORT = {
    "region": "region",
    "discs": "sliding_disc",
    "spectra": "ridgelines",
    "growth": "growth",
    "attribution": "attribution",
    "gradients": "gradients",
    "norms": "norms",
    "graph": "graph",
    "overview": "overview",
}
OF_RECORDS = ("training", "growth")
OF_STEP = {"spectrum": "spectrum", "pseudospectra": "pseudospectra"}
OF_EXPONENTS = {"lyapunov": "lyapunov", "convergence": "lyapunov_convergence", "sums": "sum_rule"}
OF_PLANE = ("flow-map", "field", "exponents")
KINDS = (*OF_REPORT, "training", *OF_STEP, *OF_EXPONENTS, "portrait", *OF_PLANE)
IN_REPORT = (*OF_REPORT, "spectrum", *OF_EXPONENTS)
RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


@command
def plot(
    source: Annotated[
        str,
        typer.Argument(
            help="A report.json that analyze wrote, a run that a monitor wrote (its directory, .jsonl or .csv), or a "
            "checkpoint or model as for analyze.",
            metavar="SOURCE",
        ),
    ],
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    loading: Loading,
    out: Annotated[
        Path | None,
        typer.Option(help="A .png, .svg or .pdf file, KIND.png by default; flow-map also .gif.", metavar="FILE"),
    ] = None,
    step: Annotated[
        str | None, typer.Option(help="Which step spectrum, pseudospectra and field show: its name or number.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--k", help="How many exponents lyapunov, convergence and sums take.")
    ] = None,
    quantity: Annotated[
        str, typer.Option(help="What growth and training show of a run: growth, gradient_norm, update_ratio, ...")
    ] = "growth",
) -> None:
    """Draw a saved report, a monitored run, or a model."""
    from stabkit.errors import ReportError
    from stabkit.monitor import is_run
    from stabkit.report import files

    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ReportError(f"no plot is called {kind!r}; there are: {', '.join(KINDS)}{guess}")
    target = out or Path(f"{kind}.png")
    if kind == "training" or is_run(source):
        figure = _of_run(source, kind, quantity)
    elif _is_report(source, kind, loading.model):
        figure = _of_report(source, kind, step)
    else:
        with stdout_to_stderr():
            loaded = loading.load(source)
            if target.suffix.lower() == ".gif":
                say(screen(), f"wrote {_animation(loaded, kind, target)}")
                return
            figure = _of_model(loaded, kind, step, count, loading.seed)
    say(screen(), f"wrote {files.write_figure(figure, target)}")


def _is_report(source: str, kind: str, model: str | None) -> bool:
    """Whether the source is meant as a report: by its suffix, or a file of text where a report will do."""
    path = Path(source)
    if path.suffix.lower() == ".json":
        return True
    if kind not in IN_REPORT or model is not None or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
    return head.isascii() and not any(byte < 9 for byte in head)  # what torch and safetensors write is binary


def _of_report(source: str, kind: str, step: str | None) -> Figure:
    from stabkit import plotting
    from stabkit.errors import ReportError
    from stabkit.report import Report

    report = Report.load(source)
    if kind not in IN_REPORT:
        raise ReportError(
            f"{kind} cannot be drawn from a report, only {', '.join(IN_REPORT)}; give the model itself as for "
            f"analyze: stabkit plot MODEL {kind} --input SHAPE"
        )
    try:
        if kind == "spectrum":
            return _figure(plotting.spectrum(report.steps[_index(report.steps, step, "z")]))
        return _figure(getattr(plotting, {**OF_REPORT, **OF_EXPONENTS}[kind])(report))
    except ValueError as error:
        raise ReportError(f"{kind} of {source}: {error}") from error


def _of_run(source: str, kind: str, quantity: str) -> Figure:
    from stabkit import plotting
    from stabkit.errors import ReportError
    from stabkit.monitor import read_records

    if kind not in OF_RECORDS:
        raise ReportError(
            f"{source} is what a monitor wrote, of which {' and '.join(OF_RECORDS)} are drawn (--quantity says what); "
            f"{kind} needs a report or a model"
        )
    try:
        return _figure(plotting.training(read_records(source), quantity=quantity))
    except ValueError as error:
        raise ReportError(f"{source}: {error}") from error


def _of_model(loaded: Loaded, kind: str, step: str | None, count: int | None, seed: int) -> Figure:
    from stabkit import growth, jacobians, plotting
    from stabkit.errors import ReportError
    from stabkit.tracing import Flow, Iteration, recurrent_flow, trace

    flow: Flow | Iteration
    try:
        if kind in OF_REPORT:
            from stabkit.analysis import analyze

            report = analyze(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, seed=seed, name=loaded.name)
            return _figure(getattr(plotting, OF_REPORT[kind])(report))
        if kind in OF_PLANE:
            return _of_plane(loaded, kind, step)
        if kind in ("portrait", *OF_EXPONENTS) and type(loaded.model).__name__ in RECURRENT:
            flow = recurrent_flow(loaded.model, *loaded.inputs, **loaded.kwargs)
        else:
            flow = trace(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, seed=seed)
        if kind == "portrait":
            return _figure(plotting.phase_portrait(flow))
        if kind in OF_EXPONENTS:
            exponents = growth.lyapunov_spectrum(flow, count, seed=seed)
            return _figure(getattr(plotting, OF_EXPONENTS[kind])(exponents))
        J = flow.steps[_index(flow.steps, step)].jacobian()
        return _figure(
            plotting.pseudospectra(J) if kind == "pseudospectra" else plotting.spectrum(jacobians.eigenvalues(J))
        )
    except ValueError as error:
        raise ReportError(f"{kind} of {loaded.name}: {error}") from error


def _animation(loaded: Loaded, kind: str, path: Path) -> Path:
    """The flow map as a moving picture."""
    from stabkit import plotting
    from stabkit.errors import ReportError
    from stabkit.tracing import trace

    if kind != "flow-map":
        raise ReportError(f"--out {path}: only flow-map can be a .gif; for {kind} use .png, .svg or .pdf")
    points = plotting.grid_points().to(_planar_input(loaded, kind).dtype)
    try:
        return plotting.animate_flow_map(trace(loaded.model, points), path)
    except (ValueError, OSError) as error:
        raise ReportError(f"{kind} of {loaded.name}: {error}") from error


def _planar_input(loaded: Loaded, kind: str) -> torch.Tensor:
    import torch

    from stabkit.errors import ReportError

    given = loaded.inputs[0] if loaded.inputs else None
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.shape[1] != 2:
        found = "none" if given is None else str(tuple(getattr(given, "shape", ())))
        raise ReportError(f"{kind} needs a model of two numbers, --input 1x2; the input here is {found}")
    return given


def _of_plane(loaded: Loaded, kind: str, step: str | None) -> Figure:
    """Pictures of a model of two numbers: the points are those of a grid, whatever the input is."""
    import torch

    from stabkit import growth, plotting
    from stabkit.tracing import trace

    given = _planar_input(loaded, kind)
    if kind == "exponents":
        axes = torch.eye(2, dtype=given.dtype)
        field = growth.exponent_field(
            lambda points: trace(loaded.model, points), torch.zeros(2, dtype=given.dtype), (axes[0], axes[1]),
            extent=(-2.0, 2.0, -2.0, 2.0),
        )  # fmt: skip
        return _figure(plotting.exponent_field(field))
    if kind == "flow-map":
        return _figure(plotting.flow_map(trace(loaded.model, plotting.grid_points().to(given.dtype))))
    flow = trace(loaded.model, plotting.grid_points(lines=15, along=15).to(given.dtype))
    return _figure(plotting.vector_field(flow, step=_index(flow.steps, step)))


def _index(steps: Sequence[Any], step: str | None, needed: str = "kind") -> int:
    """The step that ``--step`` names; without it the first that keeps the space and has what is needed."""
    from stabkit.errors import ReportError

    names = [s.name for s in steps]
    if step is None:
        return next((s.index for s in steps if s.kind == "step" and getattr(s, needed)), 0)
    if step in names:
        return names.index(step)
    if step.isdigit() and int(step) < len(names):
        return int(step)
    near = difflib.get_close_matches(step, names, n=1)
    more = ", ..." if len(names) > 8 else ""
    guess = f"; did you mean {near[0]}?" if near else f"; the steps are {', '.join(names[:8])}{more}"
    raise ReportError(f"--step {step!r}: there is no such step{guess}")


def _figure(drawn: Any) -> Figure:
    from stabkit import plotting

    figure: Figure = drawn if hasattr(drawn, "savefig") else plotting.figure_of(drawn)
    return figure
