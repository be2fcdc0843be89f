"""`stabkit plot`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.cli.console import say, screen, stdout_to_stderr
from stabkit.cli.options import Loading, command
from stabkit.errors import ReportError, did_you_mean
from stabkit.pictures import PICTURES

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from stabkit.checkpoints import Loaded
    from stabkit.jacobians import Jacobian
    from stabkit.tracing import FlowLike


@dataclass(frozen=True)
class _Source:
    """A model that something is drawn of; what a picture needs is made from it."""

    loaded: Loaded
    step: str | None
    count: int | None
    seed: int

    @functools.cached_property
    def flow(self) -> FlowLike:
        """Over depth, or over time where the model is a recurrent module."""
        import torch

        from stabkit.tracing import recurrent_flow, trace

        model, inputs, kwargs = self.loaded.model, self.loaded.inputs, self.loaded.kwargs
        if isinstance(model, torch.nn.RNNBase | torch.nn.RNNCellBase):
            return recurrent_flow(model, *inputs, **kwargs)
        return trace(model, *inputs, kwargs=kwargs, seed=self.seed)

    @property
    def jacobian(self) -> Jacobian:
        """Of the step that ``--step`` names."""
        steps = self.flow.steps
        return steps[_index(steps, self.step)].jacobian()

    @property
    def plane(self) -> torch.Tensor:
        """The input of a model of two numbers, which has their dtype."""
        import torch

        given = self.loaded.inputs[0] if self.loaded.inputs else None
        if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.shape[1] != 2:
            found = "none" if given is None else str(tuple(getattr(given, "shape", ())))
            raise ReportError(f"needs a model of two numbers, --input 1x2; the input here is {found}")
        return given

    def report(self) -> Any:
        """What `stabkit analyze` says of it."""
        from stabkit.analysis import analyze

        loaded = self.loaded
        return analyze(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, seed=self.seed, name=loaded.name)

    def grid(self, **lines: int) -> Any:
        """The flow of a grid of points, whatever the input is."""
        from stabkit import plotting
        from stabkit.tracing import trace

        return trace(self.loaded.model, plotting.grid_points(**lines).to(self.plane.dtype))

    def exponent_field(self) -> Any:
        """The largest finite-time exponent over the plane."""
        import torch

        from stabkit import growth
        from stabkit.tracing import trace

        zero, axes = self.plane.new_zeros(2), torch.eye(2, dtype=self.plane.dtype)
        square = (-2.0, 2.0, -2.0, 2.0)
        return growth.exponent_field(lambda x: trace(self.loaded.model, x), zero, (axes[0], axes[1]), extent=square)


def _of_growth(name: str, source: _Source) -> Any:
    from stabkit import growth

    return getattr(growth, name)(source.flow, source.count, seed=source.seed)


def _of_jacobian(name: str, source: _Source) -> Any:
    from stabkit import jacobians

    return getattr(jacobians, name)(source.jacobian)


# class of what is drawn -> how it is made from a model
_MAKERS: dict[str, Callable[[_Source], Any]] = {
    "Report": _Source.report,
    "Spectrum": functools.partial(_of_jacobian, "eigenvalues"),
    "Jacobian": lambda source: source.jacobian,
    "NonNormality": functools.partial(_of_jacobian, "non_normality"),
    "SingularValueDensity": functools.partial(_of_jacobian, "singular_value_density"),
    "LyapunovSpectrum": functools.partial(_of_growth, "lyapunov_spectrum"),
    "FiniteTimeExponents": functools.partial(_of_growth, "finite_time_exponents"),
    "Flow": lambda source: source.flow,
    "Grid": _Source.grid,
    "Lattice": lambda source: source.grid(lines=15, along=15),
    "ExponentField": _Source.exponent_field,
}
# exponents are in a report as well, but of a model they are had without one; else the first class that can be made
_PREFERRED = ("LyapunovSpectrum", "Report")
_STORED = ("Report", "StepReport")
KINDS = tuple(kind for kind, draws in PICTURES.items() if {*draws} & {*_MAKERS, "Records"})
IN_REPORT = tuple(kind for kind, draws in PICTURES.items() if {*draws} & {*_STORED})
IN_RECORDS = tuple(kind for kind, draws in PICTURES.items() if "Records" in draws)


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
        str | None, typer.Option(help="Which step is shown, where a picture shows one: its name or number.")
    ] = None,
    count: Annotated[int | None, typer.Option("--k", help="How many exponents are taken.")] = None,
    quantity: Annotated[
        str, typer.Option(help="What growth and training show of a run: growth, gradient_norm, update_ratio, ...")
    ] = "growth",
) -> None:
    """Draw a saved report, a monitored run, or a model."""
    from stabkit.monitor import is_run
    from stabkit.report import files

    if kind not in KINDS:
        raise ReportError(f"no plot is called {kind!r}; there are: {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    target = out or Path(f"{kind}.png")
    if kind == "training" or is_run(source):
        figure = _of_run(source, kind, quantity)
    elif _is_report(source, kind, loading.model):
        figure = _of_report(source, kind, step)
    else:
        with stdout_to_stderr():
            made = _Source(loading.load(source), step, count, loading.seed)
            if target.suffix.lower() == ".gif":
                say(screen(), f"wrote {_animation(made, kind, target)}")
                return
            figure = _of_model(made, kind)
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
    from stabkit.report import Report

    report = Report.load(source)
    if kind not in IN_REPORT:
        raise ReportError(
            f"{kind} cannot be drawn from a report, only {', '.join(IN_REPORT)}; give the model itself as for "
            f"analyze: stabkit plot MODEL {kind} --input SHAPE"
        )
    try:
        if "Report" in PICTURES[kind]:
            return _drawn(kind, "Report", report)
        return _drawn(kind, "StepReport", report.steps[_index(report.steps, step, "z")])
    except ValueError as error:
        raise ReportError(f"{kind} of {source}: {error}") from error


def _of_run(source: str, kind: str, quantity: str) -> Figure:
    from stabkit.monitor import read_records

    if kind not in IN_RECORDS:
        raise ReportError(
            f"{source} is what a monitor wrote, of which {' and '.join(IN_RECORDS)} are drawn (--quantity says what); "
            f"{kind} needs a report or a model"
        )
    try:
        return _drawn(kind, "Records", read_records(source), quantity=quantity)
    except ValueError as error:
        raise ReportError(f"{source}: {error}") from error


def _of_model(source: _Source, kind: str) -> Figure:
    draws = PICTURES[kind]
    shown = next(name for name in (*_PREFERRED, *draws) if name in draws and name in _MAKERS)
    try:
        result = _MAKERS[shown](source)
        step = _index(result.steps, source.step) if shown == "Lattice" else 0
        return _drawn(kind, shown, result, step=step)
    except (ValueError, ReportError) as error:
        raise ReportError(f"{kind} of {source.loaded.name}: {error}") from error


def _drawn(kind: str, shown: str, result: Any, **options: Any) -> Figure:
    """The picture of a result; of the options, those that its function takes."""
    from stabkit import plotting

    draw = getattr(plotting, PICTURES[kind][shown])
    taken = inspect.signature(draw).parameters
    drawn = draw(result, **{name: value for name, value in options.items() if name in taken})
    figure: Figure = drawn if hasattr(drawn, "savefig") else plotting.figure_of(drawn)
    return figure


def _animation(source: _Source, kind: str, path: Path) -> Path:
    """The flow map as a moving picture."""
    from stabkit import plotting

    if kind != "flow-map":
        raise ReportError(f"--out {path}: only flow-map can be a .gif; for {kind} use .png, .svg or .pdf")
    try:
        return plotting.animate_flow_map(source.grid(), path)
    except (ValueError, OSError, ReportError) as error:
        raise ReportError(f"{kind} of {source.loaded.name}: {error}") from error


def _index(steps: Sequence[Any], step: str | None, needed: str = "kind") -> int:
    """The step that ``--step`` names; without it the first that keeps the space and has what is needed."""
    names = [s.name for s in steps]
    if step is None:
        return next((s.index for s in steps if s.kind == "step" and getattr(s, needed)), 0)
    if step in names:
        return names.index(step)
    if step.isdigit() and int(step) < len(names):
        return int(step)
    more = ", ..." if len(names) > 8 else ""
    guess = did_you_mean(step, names) or f"; the steps are {', '.join(names[:8])}{more}"
    raise ReportError(f"--step {step!r}: there is no such step{guess}")
