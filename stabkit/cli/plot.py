"""`stabkit plot`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.cli.console import guarded, say, screen, stdout_to_stderr
from stabkit.cli.options import Debug, FactoryArgs, Input, ModelName, Seed, json_object

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stabkit.checkpoints import Loaded
    from stabkit.tracing import Flow

# what is drawn from a report.json, from the records of a monitor, and from a model that is run again
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
    out: Annotated[
        Path | None, typer.Option(help="A .png, .svg or .pdf file; KIND.png by default.", metavar="FILE")
    ] = None,
    model: ModelName = None,
    input_: Input = None,
    factory_args: FactoryArgs = None,
    step: Annotated[
        str | None, typer.Option(help="Which step spectrum, pseudospectra and field show: its name or number.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--k", help="How many exponents lyapunov, convergence and sums take.")
    ] = None,
    quantity: Annotated[
        str, typer.Option(help="What growth and training show of a run: growth, gradient_norm, update_ratio, ...")
    ] = "growth",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Draw a saved report, a monitored run, or a model."""
    with guarded(debug):
        from stabkit.errors import ReportError
        from stabkit.monitor import is_run
        from stabkit.report import files

        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ReportError(f"no plot is called {kind!r}; there are: {', '.join(KINDS)}{guess}")
        if kind == "training" or is_run(source):
            figure = _of_run(source, kind, quantity)
        elif kind in OF_REPORT:
            figure = _of_report(source, kind)
        else:
            from stabkit import checkpoints

            with stdout_to_stderr():
                arguments = json_object("--factory-args", factory_args)
                loaded = checkpoints.load(source, model=model, input=input_, factory_args=arguments, seed=seed)
                figure = _of_model(loaded, kind, step, count, seed)
        say(screen(), f"wrote {files.write_figure(figure, out or Path(f'{kind}.png'))}")


def _of_report(source: str, kind: str) -> Figure:
    from stabkit import plotting
    from stabkit.report import Report

    return _figure(getattr(plotting, OF_REPORT[kind])(Report.load(source)))


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
    from stabkit.tracing import trace

    try:
        if kind in OF_PLANE:
            return _of_plane(loaded, kind, step)
        flow = trace(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, seed=seed)
        if kind == "portrait":
            return _figure(plotting.phase_portrait(flow))
        if kind in OF_EXPONENTS:
            exponents = growth.lyapunov_spectrum(flow, count, seed=seed)
            return _figure(getattr(plotting, OF_EXPONENTS[kind])(exponents))
        J = flow.steps[_index(flow, step)].jacobian()
        return _figure(
            plotting.pseudospectra(J) if kind == "pseudospectra" else plotting.spectrum(jacobians.eigenvalues(J))
        )
    except ValueError as error:
        raise ReportError(f"{kind} of {loaded.name}: {error}") from error


def _of_plane(loaded: Loaded, kind: str, step: str | None) -> Figure:
    """Pictures of a model of two numbers: the points are those of a grid, whatever the input is."""
    import torch

    from stabkit import growth, plotting
    from stabkit.errors import ReportError
    from stabkit.tracing import trace

    given = loaded.inputs[0] if loaded.inputs else None
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.shape[1] != 2:
        found = "none" if given is None else str(tuple(getattr(given, "shape", ())))
        raise ReportError(f"{kind} needs a model of two numbers, --input 1x2; the input here is {found}")
    if kind == "exponents":
        axes = torch.eye(2, dtype=given.dtype)
        field = growth.exponent_field(
            lambda points: trace(loaded.model, points), torch.zeros(2, dtype=given.dtype), (axes[0], axes[1]),
            extent=(-2.0, 2.0, -2.0, 2.0),
        )  # fmt: skip
        return _figure(plotting.exponent_field(field))
    if kind == "flow-map":
        return plotting.flow_map(trace(loaded.model, plotting.grid_points().to(given.dtype)))
    flow = trace(loaded.model, plotting.grid_points(lines=15, along=15).to(given.dtype))
    return _figure(plotting.vector_field(flow, step=_index(flow, step)))


def _index(flow: Flow, step: str | None) -> int:
    """The step that ``--step`` names; without it the first that keeps the space."""
    from stabkit.errors import ReportError

    names = [s.name for s in flow.steps]
    if step is None:
        return next((s.index for s in flow.steps if s.kind == "step"), 0)
    if step in names:
        return names.index(step)
    if step.isdigit() and int(step) < len(names):
        return int(step)
    near = difflib.get_close_matches(step, names, n=1)
    guess = f"; did you mean {near[0]}?" if near else f"; the steps are {', '.join(names[:8])}, ..."
    raise ReportError(f"--step {step!r}: there is no such step{guess}")


def _figure(drawn: Any) -> Figure:
    from stabkit import plotting

    figure: Figure = drawn if hasattr(drawn, "savefig") else plotting.figure_of(drawn)
    return figure
