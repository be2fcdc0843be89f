"""The eigenvalues of a report against the stability regions that they must lie in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import accepts
from stabkit.plotting.plane import stable_area
from stabkit.plotting.style import (
    color_bar,
    complex_plane,
    end_of,
    finish,
    ink,
    new_axes,
    outline,
    paper,
    sample_color,
    shade,
    verbatim,
)
from stabkit.report.formats import middle
from stabkit.report.plane import Plane, plane_of, worst

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.integrators import GeneralLinearMethod
    from stabkit.report import Report, StepReport

LARGEST_VIEW = 8.0  # radii that a picture may show around the regions: more, and they would be dots
_RANGES = 3  # numerical ranges that can be told apart
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


@accepts
def region(report: Report, ax: Axes | None = None) -> Axes:
    r"""The eigenvalues of every step against the stability region of its method; depth is the color.

    A step x' = a x + f(x) with an eigenvalue z of the Jacobian of f multiplies that mode by a + z, so it is
    stable where \|a + z\| <= 1: for a = 1 the disc of forward Euler about -1 (Hairer and Wanner, Solving
    Ordinary Differential Equations II, section IV.2). A method of several stages has the region \|R(z)\| <= 1, with
    z = h times the eigenvalues of the Jacobian of its field. Triangles on the frame stand for eigenvalues beyond it.
    Dashed outlines are numerical ranges, of the steps where they reach furthest: while one lies in a disc, no power of
    that step exceeds 2 (Berger). The ring marks the eigenvalue with the smallest margin, negative outside its region.

    Args:
        report: a report; its steps without eigenvalues are left out, those without a known skip have a = 0.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 7, margin=0.03)
    steps = [step for step in report.steps if step.z is not None]
    planes = [plane for step in steps if (plane := plane_of(step)) is not None]
    discs = sorted({plane.a for plane in planes if plane.method is None}, reverse=True)
    methods = list({plane.method: None for plane in planes if plane.method is not None})
    z, depth = _points(steps, planes)
    ranges = _ranges(steps, planes)
    low, high = _view(np.concatenate([z, *(boundary for _, boundary in ranges)]), discs, methods)
    _regions(ax, discs, methods, (low, high))
    colors, norm = _depth_colors(ax, len(report.steps))
    for step, boundary in ranges:
        outline(ax, boundary, colors(norm(step.index)), zorder=1.5)
    _eigenvalues(ax, z, depth, (low, high), colors, norm, font)
    _depth_bar(ax, colors, norm, len(report.steps) if len(z) else 0, font)
    notes = [*_margin(ax, steps, planes), *(["dashed: numerical range"] if ranges else [])]
    complex_plane(ax)
    ax.set_xlim(low.real, high.real)
    ax.set_ylim(low.imag, high.imag + _headroom(discs, methods) * (high.imag - low.imag))
    ax.set_aspect("equal")
    if any(step.spectrum_method == "krylov" for step in steps):
        _note(ax, (0.03, 0.03), "largest |a + z| only", font, ha="left", va="bottom")
    if not steps:
        words = "no eigenvalues\nin this report"
        ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=font)
    if len(discs) + len(methods) > 1:
        ax.legend(loc="upper center", ncols=2, fontsize=font, handlelength=1.2, frameon=False, borderpad=0.2,
                  labelspacing=0.2, columnspacing=0.8)  # fmt: skip
    finish(ax, font, "Re z", "Im z", _title(discs, methods))
    if notes:
        ax.set_title("\n".join([ax.get_title(), " · ".join(notes)]), fontsize=font)
    return ax


def _headroom(discs: list[float], methods: list[GeneralLinearMethod]) -> float:
    """Room above the regions for what they are called, as a fraction of their window."""
    names = (1 if len(discs) > len(_STYLES) else len(discs)) + len(methods)
    share = 0.03 + 0.09 * -(-names // 2)
    return share / (1 - share) if len(discs) + len(methods) > 1 else 0.0


def _title(discs: list[float], methods: list[GeneralLinearMethod]) -> str:
    if len(discs) + len(methods) != 1:
        return "Stability region" if not methods else "Stability regions"
    return (
        f"Stability region {_inequality(discs[0])}"
        if discs
        else f"Stability region, {verbatim(middle(methods[0].name, 24))}"
    )


def _inequality(a: float) -> str:
    return f"|{a:.3g} + z| ≤ 1" if a else "|z| ≤ 1"


def _points(steps: Sequence[StepReport], planes: Sequence[Plane]) -> tuple[NDArray[np.complex128], NDArray[np.int64]]:
    z = np.concatenate([np.empty(0, dtype=complex), *(plane.z for plane in planes)])
    depth = np.repeat(np.array([step.index for step in steps], dtype=np.int64), [len(plane.z) for plane in planes])
    finite = np.isfinite(z)
    return z[finite], depth[finite]


def _ranges(steps: Sequence[StepReport], planes: Sequence[Plane]) -> list[tuple[StepReport, NDArray[np.complex128]]]:
    """The numerical ranges that reach furthest, in the plane of the discs."""
    found = []
    for step, plane in zip(steps, planes, strict=True):
        boundary = np.asarray(step.numerical_range or (), dtype=complex)
        if plane.method is None and len(boundary) and np.isfinite(boundary).all():
            found.append((float(np.abs(boundary + plane.a).max()), step, boundary))
    found.sort(key=lambda one: -one[0])
    return [(step, boundary) for _, step, boundary in found[:_RANGES]]


def _margin(ax: Axes, steps: Sequence[StepReport], planes: Sequence[Plane]) -> list[str]:
    """Ring the eigenvalue with the smallest margin, join it to the boundary, and say how far that is."""
    place = worst(planes)
    if place is None:
        return []
    plane, margin = planes[place], planes[place].margin
    if plane.outermost is not None:
        z, center = plane.outermost, complex(-plane.a)
        edge = center + (z - center) / (abs(z - center) or 1.0)
        ax.plot([z.real, edge.real], [z.imag, edge.imag], color=ink(ax), linewidth=0.8, zorder=2.5)
        ax.plot([z.real], [z.imag], "o", markersize=6, markerfacecolor="none", markeredgecolor=ink(ax),
                markeredgewidth=0.8, zorder=4)  # fmt: skip
    return [f"margin {margin:+.2g} at {end_of(steps[place].name, 9)}".replace("-", "−", 1)]


def _note(ax: Axes, where: tuple[float, float], words: str, font: float | None, **place: Any) -> None:
    halo = [withStroke(linewidth=2.5, foreground=paper(ax))]  # eigenvalues may lie beneath
    ax.text(*where, words, fontsize=font, path_effects=halo, transform=ax.transAxes, zorder=5, **place)


def _regions(
    ax: Axes,
    discs: list[float],
    methods: list[GeneralLinearMethod],
    frame: tuple[complex, complex],
) -> None:
    """One disc per skip coefficient, one level line per method, named in the legend while there are few."""
    crowded = len(discs) > len(_STYLES)
    for i, a in enumerate(discs):
        label = _inequality(a)
        if crowded:
            label = "_" if i else f"|a + z| ≤ 1, a = {discs[-1]:.3g} to {discs[0]:.3g}"
        edge: dict[str, Any] = (
            {"linewidth": 0.4, "linestyle": "-"} if crowded else {"linewidth": 0.9, "linestyle": _STYLES[i]}
        )
        ax.add_patch(Circle((-a, 0), 1, facecolor=shade(ax), edgecolor="none", zorder=-2))
        ax.add_patch(Circle((-a, 0), 1, fill=False, edgecolor=ink(ax), label=label, zorder=1, **edge))
    for i, method in enumerate(methods):
        style = _STYLES[(len(discs) + i) % len(_STYLES)]
        stable_area(ax, method, frame, style)
        label = f"|R(z)| ≤ 1, {verbatim(middle(method.name, 10))}"
        ax.add_line(Line2D([], [], color=ink(ax), linewidth=0.9, linestyle=style, label=label))


def _view(z: NDArray[np.complex128], discs: list[float], methods: list[GeneralLinearMethod]) -> tuple[complex, complex]:
    """Corners of a window around all regions and nearly all eigenvalues, square enough to read."""
    boxes = [(-a - 1.0, 1.0 - a, 1.0) for a in discs]
    for method in methods:
        left, right, _, top = method.region().box
        boxes.append((max(left, -LARGEST_VIEW), min(right, LARGEST_VIEW), min(top, LARGEST_VIEW)))
    left = min((box[0] for box in boxes), default=-1.0)
    right = max((box[1] for box in boxes), default=1.0)
    top = max((box[2] for box in boxes), default=1.0)
    center = (left + right) / 2
    if not len(z):
        half = 1.4 * max((right - left) / 2, top)
        return complex(center - half, -half), complex(center + half, half)
    limit = min(float(np.quantile(np.abs(z - center), 0.98)) * 1.2, LARGEST_VIEW)
    near = z[np.abs(z - center) <= limit]
    left, right = min(near.real.min(initial=center), left), max(near.real.max(initial=center), right)
    half = max(float(np.abs(near.imag).max(initial=0.0)), top, (right - left) / 2 * 0.75)
    margin = 0.12 * half
    return complex(left - margin, -half - margin), complex(right + margin, half + margin)


def _eigenvalues(
    ax: Axes,
    z: NDArray[np.complex128],
    depth: NDArray[np.int64],
    frame: tuple[complex, complex],
    colors: ListedColormap,
    norm: BoundaryNorm,
    font: float | None,
) -> None:
    # drawn in a fixed random order, so that late steps do not hide early ones
    order = np.random.default_rng(0).permutation(len(z))
    z, depth = z[order], depth[order]
    low, high = frame
    beyond = (z.real < low.real) | (z.real > high.real) | (z.imag < low.imag) | (z.imag > high.imag)
    size = float(np.clip(3000 / max(len(z), 1), 3, 14))
    look: dict[str, Any] = {"cmap": colors, "norm": norm, "rasterized": len(z) > 2000}
    near = z[~beyond]
    ax.scatter(near.real, near.imag, c=depth[~beyond], s=size, linewidths=0, alpha=0.85, zorder=2, **look)
    if beyond.any():
        pad = 0.02 * (high - low)
        x = z.real[beyond].clip(low.real + pad.real, high.real - pad.real)
        y = z.imag[beyond].clip(low.imag + pad.imag, high.imag - pad.imag)
        ax.scatter(x, y, c=depth[beyond], s=16, marker="^", linewidths=0.3, edgecolors=ink(ax), zorder=3, **look)
        text = f"{int(beyond.sum())} beyond, |z| up to {np.abs(z).max():.2g}"
        _note(ax, (0.97, 0.97), text, font, ha="right", va="top")


def _depth_bar(ax: Axes, colors: ListedColormap, norm: BoundaryNorm, n: int, font: float | None) -> None:
    if n < 2:
        return
    bar = color_bar(ax, ScalarMappable(norm, colors), "step", font, ticks=MaxNLocator(5, integer=True))
    bar.ax.minorticks_off()


def _depth_colors(ax: Axes, n: int) -> tuple[ListedColormap, BoundaryNorm]:
    """One color per step."""
    colors = ListedColormap([sample_color(ax, index, max(n, 2)) for index in range(max(n, 2))])
    return colors, BoundaryNorm(np.arange(-0.5, max(n, 2)), max(n, 2))
