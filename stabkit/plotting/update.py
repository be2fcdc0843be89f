"""The updates of an optimizer as steps of an integrator, beside the blocks of the model as steps of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators import GeneralLinearMethod
from stabkit.plotting.plane import stable_area
from stabkit.plotting.region import region
from stabkit.plotting.style import BLUE, ORANGE, complex_plane, end_of, finish, ink, new_axes, side_by_side, verbatim
from stabkit.report.formats import figures

if TYPE_CHECKING:
    from stabkit.report import Report, TrainingReport

_BEYOND = 3.0  # lengths of the stable interval that are shown: what lies further stands on the frame, as a triangle
_BLOCKS = 3
_FLAT = 0.25  # height over length of a region under which it is drawn higher than it is, or it would be a line
_HEADROOM = 0.42  # of the window, for what the marks are called


@accepts
def updates(report: Report) -> Figure:
    """The optimizer's stability region with its modes, and the blocks' regions with theirs, side by side.

    Args:
        report: of an analysis with a loss and an optimizer.

    Raises:
        ArgumentError: the report has no optimizer.
    """
    _training(report)
    return side_by_side((update, region), report)


@accepts
def update(report: Report, ax: Axes | None = None) -> Axes:
    """Modes of the loss under the optimizer: z = -rate x curvature on the stability region of its method.

    The update multiplies the weights along an eigenvector of curvature c by M(z); it is stable while z lies in the
    region, on the real axis from minus the threshold times the rate to 0. The diamond is the largest curvature, dots
    are the largest within single blocks, named from the left. A mode beyond the frame stands on it, as a triangle.

    Args:
        report: of an analysis with a loss and an optimizer.
        ax: where to draw; a new figure when None.

    Raises:
        ArgumentError: the report has no optimizer.
    """
    training = _training(report)
    ax, font = new_axes(ax, 8, 7)
    title = f"Updates of {verbatim(training.optimizer)}, rate {figures(training.learning_rate)}"
    if training.tableau is None or training.preconditioned is None or training.threshold is None:
        ax.text(
            0.5, 0.5, "no threshold\n(see the notes)", transform=ax.transAxes, ha="center", va="center", fontsize=font
        )
        return finish(ax, font, "Re z", "Im z", title)
    method = GeneralLinearMethod(*(training.tableau[name] for name in "AUBV"), name=training.method or "")
    end = -training.learning_rate * training.threshold
    left, right, low, high = _window(method, end, -training.learning_rate * training.preconditioned)
    stable_area(ax, method, (complex(left, low), complex(right, high)))
    complex_plane(ax)
    _marks(ax, training, end, left, font)
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)
    if not _is_flat(method):
        ax.set_aspect("equal")
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ratio = "" if training.ratio is None else f"\nratio {figures(training.ratio)}"
    vertical = "Im z, stretched" if _is_flat(method) else "Im z"
    return finish(ax, font, "Re z, z = −rate × curvature", vertical, title + ratio)


def _training(report: Report) -> TrainingReport:
    if report.training is None:
        raise ArgumentError(
            "the report has no optimizer; analyse with loss= and optimizer=, or stabkit analyze --loss NAME --labels "
            "FILE --optimizer sgd:lr=0.1"
        )
    return report.training


def _window(method: GeneralLinearMethod, end: float, largest: float) -> tuple[float, float, float, float]:
    """Left, right, lower and upper end: the region, the largest mode where it is not too far, and room above for names.

    Where a unit is as long on both axes, the window is as wide as it is high at least.
    """
    top = _top(method)
    left = max(min(1.2 * end, 1.1 * largest), _BEYOND * end)
    right = -0.08 * left
    height = 2.4 * top if _is_flat(method) else max(2.4 * top, 0.5 * (right - left))
    above = height * _HEADROOM / (1 - _HEADROOM)
    spare = 0.0 if _is_flat(method) else max(0.0, 1.15 * (height + above) - (right - left)) / 2
    return left - spare, right + spare, -height / 2, height / 2 + above


def _top(method: GeneralLinearMethod) -> float:
    """How far the region reaches upwards."""
    return max(float(np.abs(curve.points.imag).max()) for curve in method.region().curves)


def _is_flat(method: GeneralLinearMethod) -> bool:
    return _top(method) < _FLAT * float(method.real_interval())


def _marks(ax: Axes, training: TrainingReport, end: float, left: float, font: float | None) -> None:
    """The end of the stable interval, the modes, and what they are called."""
    rate = training.learning_rate
    alone = sorted((-rate * b.curvature, b.name) for b in training.blocks[:_BLOCKS] if b.curvature is not None)
    ax.plot([end, 0], [0, 0], color=ink(ax), linewidth=2.0, solid_capstyle="butt", zorder=1.5)
    ax.plot([end], [0], "|", color=ink(ax), markersize=9, label=_called("stable to", end), zorder=2)
    if training.preconditioned is not None:
        largest = -rate * training.preconditioned
        _points(ax, [largest], left, "D", ORANGE, _called("largest mode,", largest))
    names = ", ".join(end_of(name or "the model", 10) for _, name in alone)
    _points(ax, [z for z, _ in alone], left, "o", BLUE, f"blocks alone: {names}")
    ax.legend(loc="upper left", fontsize=font, frameon=False, handlelength=1.0, borderpad=0.1, labelspacing=0.25)


def _called(what: str, z: float) -> str:
    return f"{what} z = {figures(z)}".replace("-", "−")


def _points(ax: Axes, z: Sequence[float], left: float, marker: str, color: str, label: str) -> None:
    if not z:
        return
    inner = 0.97 * left
    beyond = np.array([value < inner for value in z])
    x = np.maximum(np.asarray(z, dtype=float), inner)
    look: dict[str, Any] = {
        "markeredgewidth": 0.5,
        "markeredgecolor": ink(ax),
        "zorder": 4 + (marker == "D"),
        "clip_on": False,
    }
    size = 6.0 if marker == "D" else 4.5
    for chosen, shown in ((~beyond, marker), (beyond, "<")):
        if chosen.any():
            ax.plot(x[chosen], 0 * x[chosen], shown, color=color, markersize=size, label=label, **look)
            label = "_"
