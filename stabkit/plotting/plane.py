"""Pictures in the complex plane: stability regions and eigenvalues."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from stabkit.plotting.style import BLUE, GREY, LIGHT, ORANGE, finish, new_axes, sample_color, small_text
from stabkit.report.tables import middle

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from stabkit.integrators.linear_stability import LinearStability
    from stabkit.jacobians import SingularValueDensity
    from stabkit.report import Report, StepReport

LARGEST_VIEW = 25.0  # radii of the stability region that a picture of it may show


def region(report: Report, ax: Axes | None = None) -> Axes:
    r"""The eigenvalues of every step against the stability region of its method.

    A step x' = a x + f(x) with an eigenvalue z of the Jacobian of f multiplies that mode by a + z, so it is
    stable where \|a + z\| <= 1: for a = 1 the disc of forward Euler about -1 (Hairer and Wanner, Solving
    Ordinary Differential Equations II, section IV.2). Triangles on the frame stand for eigenvalues beyond it.

    Args:
        report: a report; its steps without eigenvalues are left out, those without a known skip have a = 0.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 7, margin=0.03)
    steps = [step for step in report.steps if step.z is not None]
    discs = sorted({_skip(step) for step in steps}, reverse=True)
    _discs(ax, discs, steps)
    points = [np.asarray(step.z, dtype=complex) for step in steps]
    z = np.concatenate([np.empty(0, dtype=complex), *points])
    depth = np.repeat([step.index for step in steps], [len(values) for values in points])
    finite = np.isfinite(z)
    z, depth = z[finite], depth[finite]
    low, high = _view(z, discs)
    _eigenvalues(ax, z, depth, (low, high), len(report.steps), font)
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    # above the discs there must be room for what they are called
    headroom = 0.14 * min(len(discs), 4) * high.imag if len(discs) > 1 else 0.0
    ax.set_xlim(low.real, high.real)
    ax.set_ylim(low.imag, high.imag + headroom)
    ax.set_aspect("equal")
    title = "Stability region"
    if any(step.spectrum_method == "krylov" for step in steps):
        words = "largest |a + z| only"
        halo = [withStroke(linewidth=2.5, foreground="white")]  # eigenvalues may lie beneath
        label = ax.text(0.03, 0.03, words, fontsize=font, path_effects=halo, transform=ax.transAxes, zorder=4)
        label.set(ha="left", va="bottom")
    if not steps:
        words = "no eigenvalues\nin this report"
        ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=font)
    elif len(discs) == 1:
        title = f"Stability region {_inequality(discs[0])}"
    else:
        ax.legend(loc="upper left", fontsize=font, handlelength=1.5, borderpad=0.2, labelspacing=0.2, framealpha=0.8)
    return finish(ax, font, "Re z", "Im z", title)


def _inequality(a: float) -> str:
    return f"|{a:.3g} + z| ≤ 1" if a else "|z| ≤ 1"


def _skip(step: StepReport) -> float:
    return round(float(step.skip or 0.0), 6)


def _discs(ax: Axes, discs: list[float], steps: list[StepReport]) -> None:
    """One disc per skip coefficient, named in the legend while there are few."""
    method = {_skip(step): step.method for step in reversed(steps)}
    styles = ["-", "--", ":", "-."]
    crowded = len(discs) > len(styles)
    for i, a in enumerate(discs):
        label = f"{_inequality(a)}, {middle(method[a].partition(' (')[0], 14)}"
        if crowded:
            label = "_" if i else f"|a + z| ≤ 1, a = {discs[-1]:.3g} to {discs[0]:.3g}"
        edge: dict[str, Any] = (
            {"linewidth": 0.4, "linestyle": "-"} if crowded else {"linewidth": 0.9, "linestyle": styles[i]}
        )
        ax.add_patch(Circle((-a, 0), 1, facecolor=LIGHT, edgecolor="none", zorder=-2))
        ax.add_patch(Circle((-a, 0), 1, fill=False, edgecolor="black", label=label, zorder=1, **edge))


def _view(z: NDArray[np.complex128], discs: list[float]) -> tuple[complex, complex]:
    """Corners of a window around all discs and nearly all eigenvalues, square enough to read."""
    center = -float(np.mean(discs)) if discs else 0.0
    spread = (max(discs) - min(discs)) / 2 if discs else 0.0
    if not len(z):
        return complex(center - 1.4, -1.4), complex(center + 1.4, 1.4)
    limit = min(float(np.quantile(np.abs(z - center), 0.98)) * 1.2, LARGEST_VIEW)
    near = z[np.abs(z - center) <= limit]
    reach = [np.abs(near.imag).max(initial=0.0), 1.0]
    left = min(near.real.min(initial=center), center - spread - 1)
    right = max(near.real.max(initial=center), center + spread + 1)
    half = max(max(reach), (right - left) / 2 * 0.75)
    margin = 0.12 * half
    return complex(left - margin, -half - margin), complex(right + margin, half + margin)


def _eigenvalues(
    ax: Axes,
    z: NDArray[np.complex128],
    depth: NDArray[np.int64],
    frame: tuple[complex, complex],
    n: int,
    font: float | None,
) -> None:
    # drawn in a fixed random order, so that late steps do not hide early ones
    order = np.random.default_rng(0).permutation(len(z))
    z, depth = z[order], depth[order]
    low, high = frame
    beyond = (z.real < low.real) | (z.real > high.real) | (z.imag < low.imag) | (z.imag > high.imag)
    colors, norm = _depth_colors(n)
    size = float(np.clip(3000 / max(len(z), 1), 3, 14))
    look: dict[str, Any] = {"cmap": colors, "norm": norm, "rasterized": len(z) > 2000}
    near = z[~beyond]
    ax.scatter(near.real, near.imag, c=depth[~beyond], s=size, linewidths=0, alpha=0.85, **look)
    if beyond.any():
        pad = 0.02 * (high - low)
        x = z.real[beyond].clip(low.real + pad.real, high.real - pad.real)
        y = z.imag[beyond].clip(low.imag + pad.imag, high.imag - pad.imag)
        ax.scatter(x, y, c=depth[beyond], s=16, marker="^", linewidths=0.3, edgecolors="black", **look)
        text = f"{int(beyond.sum())} beyond, |z| up to {np.abs(z).max():.2g}"
        ax.text(0.97, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=font)
    if n > 1 and len(z):
        bar = ax.figure.colorbar(
            ScalarMappable(norm, colors), cax=ax.inset_axes((1.03, 0, 0.05, 1)), ticks=MaxNLocator(5, integer=True)
        )
        bar.set_label("step", fontsize=font)
        bar.ax.minorticks_off()
        small_text(bar.ax, font)


def _depth_colors(n: int) -> tuple[ListedColormap, BoundaryNorm]:
    """One color per step; the palest end of viridis is left out because it fades on white."""
    colors = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, max(n, 2))))
    return colors, BoundaryNorm(np.arange(-0.5, max(n, 2)), max(n, 2))


def spectrum(spectrum: Any, ax: Axes | None = None) -> Axes:
    """A spectrum: eigenvalues in the plane with the unit circle, or singular values in falling order.

    Hollow markers have not converged.

    Args:
        spectrum: an object with ``values`` (batch, k), complex for eigenvalues, and ``converged`` (batch, k).
        ax: where to draw; a new figure when None.
    """
    values = np.atleast_2d(np.asarray(spectrum.values))
    converged = np.broadcast_to(np.asarray(spectrum.converged, dtype=bool), values.shape)
    planar = np.iscomplexobj(values)
    ax, font = new_axes(ax, 8, 7 if planar else 6)
    for sample, (row, good) in enumerate(zip(values, converged, strict=True)):
        color = sample_color(sample, len(values))
        if planar:
            x, y = row.real, row.imag
        else:
            order = np.argsort(-row, kind="stable")
            x, y, good = np.arange(1, len(row) + 1), row[order], good[order]
        ax.scatter(x[good], y[good], s=8, color=color, linewidths=0)
        ax.scatter(x[~good], y[~good], s=10, facecolors="none", edgecolors=color, linewidths=0.7)
    if planar:
        ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor="black", linewidth=0.8))
        ax.autoscale_view()
        ax.set_aspect("equal", adjustable="datalim")
        return finish(ax, font, "Re λ", "Im λ", "Eigenvalues of J")
    if (values[np.isfinite(values)] > 0).all():
        ax.set_yscale("log")
    ax.axhline(1, color=GREY, linewidth=0.6, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return finish(ax, font, "index", "singular value", "Singular values of J")


def singular_value_density(density: SingularValueDensity, ax: Axes | None = None, *, sample: int = 0) -> Axes:
    """The share of singular values up to each size, with the band in which it lies at 95 % confidence.

    Args:
        density: from ``stabkit.jacobians.singular_value_density``.
        ax: where to draw; a new figure when None.
        sample: which sample.
    """
    ax, font = new_axes(ax, 8, 6)
    x = np.linspace(0.0, 1.05 * float(density.nodes[sample].max()) or 1.0, 300)
    points = density.nodes.new_tensor(x)
    low, high = density.cumulative_interval(points)[sample].T.numpy()
    ax.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(x, density.cumulative(points)[sample].numpy(), color=BLUE, linewidth=1.1)
    ax.set_ylim(0, 1)
    return finish(ax, font, "singular value", "share up to it", "Distribution of the singular values")


def method(method: LinearStability, ax: Axes | None = None, *, z: ArrayLike | None = None) -> Axes:
    """The stability region of an integrator: where the powers of M(z) stay bounded.

    Args:
        method: a method of ``stabkit.integrators``; all its fields see the same z.
        ax: where to draw; a new figure when None.
        z: points to draw on top, such as the eigenvalues h lambda of a problem; the picture grows to hold them.
    """
    ax, font = new_axes(ax, 8, 7)
    left, right, height = _window(method)
    points = np.ravel(np.asarray([] if z is None else z, dtype=complex))
    points = points[np.isfinite(points)]
    if points.size:
        left, right = min(left, 1.1 * points.real.min()), max(right, 1.1 * points.real.max())
        height = max(height, 1.1 * float(np.abs(points.imag).max()))
    x, y = np.linspace(left, right, 401), np.linspace(-height, height, 401)
    with np.errstate(all="ignore"):
        radius = np.nan_to_num(method.amplification(x[None, :] + 1j * y[:, None]), nan=np.inf, posinf=1e300)
    # the logarithm keeps the contour smooth beside poles
    level = np.log(np.maximum(radius, 1e-300))
    ax.contourf(x, y, level, levels=[-1e3, 0.0], colors=[LIGHT])
    ax.contour(x, y, level, levels=[0.0], colors=["black"], linewidths=0.9)
    reach = min(float(method.imaginary_interval()), height)
    if reach > 0:
        # the region of leapfrog is nothing but this
        ax.plot([0, 0], [-reach, reach], color=ORANGE, linewidth=1.4)
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    if points.size:
        ax.scatter(points.real, points.imag, s=9, color=BLUE, linewidths=0, zorder=3)
    ax.set_xlim(left, right)
    ax.set_ylim(-height, height)
    ax.set_aspect("equal")
    return finish(ax, font, "Re z", "Im z", f"Stability region, {middle(method.name, 24)}")


def _window(method: LinearStability) -> tuple[float, float, float]:
    """Left, right and upper end of a picture that shows the whole region, or where it starts to be everything."""
    if math.isinf(method.real_interval()) or math.isinf(method.imaginary_interval()):
        return -6.9, 5.0, 4.0
    left, right, _, top = method.region().box
    return min(left, -0.6), max(right, 0.6), max(top, 0.6)
