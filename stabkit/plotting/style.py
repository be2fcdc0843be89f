"""What all pictures share: colors, sizes, new Axes, and figures as bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Circle
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from stabkit.arguments import a, accepts
from stabkit.errors import ArgumentTypeError
from stabkit.text import printable

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
LIGHT = "#E8EEF2"
DIVERGING = LinearSegmentedColormap.from_list("stabkit.diverging", [BLUE, "#FFFFFF", ORANGE])  # shrinks, keeps, grows
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue, ITU-R BT.709
FONT = 8.0  # points, in figures 8 cm wide: still 6 points when printed at 6 cm
CENTIMETER = 1 / 2.54


def new_axes(ax: Axes | None, width: float, height: float, margin: float = 0.0) -> tuple[Axes, float | None]:
    """The given Axes, or new ones in a figure of that many centimetres, and the size of all their text in points.

    In Axes that were given, text takes the size that was set for the tick labels; None is matplotlib's own.
    """
    if ax is not None:
        if not isinstance(ax, Axes):
            raise ArgumentTypeError(f"ax is {a(type(ax).__name__)}; expected Axes of matplotlib, or None for new ones")
        return ax, ax.yaxis.get_tick_params().get("labelsize")
    # the layout does not see labels of an inset color bar beside axes of equal aspect: the margin is for them
    layout = ConstrainedLayoutEngine(rect=(margin, 0, 1 - 2 * margin, 1))
    figure = Figure(figsize=(width * CENTIMETER, height * CENTIMETER), dpi=200, layout=layout)
    ax = figure.subplots()
    small_text(ax, FONT)
    return ax, FONT


def sample_color(ax: Axes, index: int, n: int) -> Any:
    """The color of one of ``n`` curves; the end of viridis that fades on the paper is left out."""
    low, high = (0.25, 1.0) if is_dark(ax) else (0.0, 0.92)
    return BLUE if n == 1 else matplotlib.colormaps["viridis"](low + (high - low) * index / (n - 1))


def is_dark(ax: Axes) -> bool:
    """Whether Axes have a dark ground, as in a notebook with a dark style."""
    colors = [ax.get_facecolor(), figure_of(ax).get_facecolor()]
    solid = [to_rgba(color)[:3] for color in colors if to_rgba(color)[3] > 0]
    if solid:
        return bool(np.dot(solid[0], _LUMINANCE) < 0.4)
    return bool(np.dot(to_rgba(ax.yaxis.label.get_color())[:3], _LUMINANCE) > 0.6)  # what is behind is meant for it


def ink(ax: Axes, strength: float = 1.0) -> tuple[float, float, float, float]:
    """The color of lines that belong to no category: black on light ground, white on dark."""
    return to_rgba("white" if is_dark(ax) else "black", strength)


def paper(ax: Axes) -> tuple[float, float, float, float]:
    """The color of the ground."""
    return to_rgba("black" if is_dark(ax) else "white")


def shade(ax: Axes) -> str:
    """The color of areas, close to the ground."""
    return "#26313A" if is_dark(ax) else LIGHT


def small_text(ax: Axes, font: float | None) -> None:
    """Set the size of the tick labels, and lines as fine as small text needs; nothing when ``font`` is None."""
    if font is not None:
        ax.tick_params(which="both", labelsize=font, width=0.5, length=2)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_offset_text().set_fontsize(font)
        ax.spines[:].set_linewidth(0.5)


def finish(ax: Axes, font: float | None, x: str | None, y: str, title: str) -> Axes:
    """Label Axes and return them; ``x`` is None where the axis has its label already."""
    if x is not None:
        ax.set_xlabel(x, fontsize=font)
    ax.set_ylabel(y, fontsize=font)
    ax.set_title(title, fontsize=font)
    return ax


def empty(ax: Axes, words: str, font: float | None) -> None:
    """Say in the middle of Axes why nothing is drawn there, and take the numbers off an axis that has none."""
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=font)
    ax.set_yticks([])


def color_bar(ax: Axes, image: Any, label: str, font: float | None, ticks: Any = None) -> Colorbar:
    """The scale of the colors of ``image``, to the right of Axes and as high as they are."""
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.05, 1)), ticks=ticks)
    bar.set_label(label, fontsize=font)
    small_text(bar.ax, font)
    return bar


def around_zero(values: npt.ArrayLike, share: float = 1.0) -> TwoSlopeNorm:
    """The scale of `DIVERGING`: white at zero, the same color for the same size on both sides.

    It reaches as far as that share of the values which are finite.
    """
    sizes = np.abs(np.asarray(values, dtype=float))
    sizes = sizes[np.isfinite(sizes)]
    reach = float(np.quantile(sizes, share)) if sizes.size else 0.0
    return TwoSlopeNorm(0.0, -(reach or 1.0), reach or 1.0)


def complex_plane(ax: Axes) -> None:
    """Fine lines through zero, beneath all that is drawn."""
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=0)


def unit_circle(ax: Axes) -> None:
    """Where an eigenvalue of a Jacobian neither grows nor decays."""
    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=ink(ax), linewidth=0.8))


def outline(ax: Axes, boundary: npt.NDArray[np.complex128], color: Any, **look: Any) -> None:
    """A numerical range: its boundary, a closed dashed line."""
    around = np.append(boundary, boundary[0])
    ax.plot(around.real, around.imag, "--", color=color, linewidth=0.8, **look)


def side_by_side(draws: Sequence[Callable[[Any, Axes], Axes]], result: Any) -> Figure:
    """Several pictures of one result in a row."""
    figure = Figure(figsize=(9 * len(draws) * CENTIMETER, 7.5 * CENTIMETER), dpi=200, layout="constrained")
    for draw, ax in zip(draws, figure.subplots(1, len(draws)), strict=True):
        small_text(ax, FONT)
        draw(result, ax)
    return figure


def verbatim(text: str) -> str:
    r"""A name from a model as matplotlib must be given it: it reads what stands between two dollars as mathematics.

    Example:
        >>> verbatim("cost_$")
        'cost_\\$'
    """
    return printable(text).replace("$", r"\$")


def end_of(name: str, width: int) -> str:
    """The end of a name, where blocks differ, for a picture; the beginning is what they share."""
    return verbatim(name if len(name) <= width else f"…{name[1 - width :]}")


@accepts
def figure_of(ax: Axes) -> Figure:
    """The figure that Axes are in, also when they are in a part of it."""
    figure = ax.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    return figure


@accepts
def render(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a ``"png"``, ``"svg"`` or ``"pdf"`` file; the same figure gives the same bytes."""
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
    dates: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "stabkit"}):
        figure.savefig(stream, format=kind, metadata=dates[kind])
    return stream.getvalue()


def log_limits(ax: Axes, values: npt.NDArray[np.float64]) -> None:
    """At least one decade, so that a flat profile looks flat; plain numbers on the axis while there are few decades."""
    if not len(values):
        ax.set_ylim(0.1, 10)
        return
    low, high = float(np.log10(values.min())), float(np.log10(values.max()))
    margin = max(0.0, 1.0 - (high - low)) / 2 + 0.06 * (high - low)
    # matplotlib cannot place ticks at the very ends of the range of a float
    ax.set_ylim(10.0 ** max(low - margin, -300), 10.0 ** min(high + margin, 300))
    if high - low < 3:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2 else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        # LogLocator looks beyond the ends of the axis, and beyond the largest float
        every = math.ceil((high - low) / 5)
        ax.yaxis.set_major_locator(
            FixedLocator([10.0**k for k in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1, every)])
        )
    ax.yaxis.set_minor_formatter(NullFormatter())
