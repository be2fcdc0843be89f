"""Pictures in the complex plane: spectra, and the stability regions of methods."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import a, accepts
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.plotting.style import (
    BLUE,
    GREY,
    ORANGE,
    complex_plane,
    finish,
    ink,
    log_limits,
    new_axes,
    sample_color,
    shade,
    unit_circle,
    verbatim,
)
from stabkit.report import StepReport
from stabkit.report.formats import middle

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from stabkit.integrators.linear_stability import LinearStability
    from stabkit.jacobians import SingularValueDensity

_GRID = 401  # points along each side of a region


def spectrum(spectrum: Any, ax: Axes | None = None) -> Axes:
    """A spectrum: eigenvalues in the plane with the unit circle, or singular values in falling order.

    Hollow markers have not converged.

    Args:
        spectrum: an object with ``values`` (batch, k), complex for eigenvalues, and ``converged`` (batch, k), or one
            step of a report.
        ax: where to draw; a new figure when None.

    Raises:
        ArgumentError: the step of a report has no eigenvalues.
    """
    values, converged = _spectrum(spectrum)
    planar = np.iscomplexobj(values)
    ax, font = new_axes(ax, 8, 7 if planar else 6)
    for sample, (row, good) in enumerate(zip(values, converged, strict=True)):
        color = sample_color(ax, sample, len(values))
        if planar:
            x, y = row.real, row.imag
        else:
            order = np.argsort(-row, kind="stable")
            x, y, good = np.arange(1, len(row) + 1), row[order], good[order]
        ax.scatter(x[good], y[good], s=8, color=color, linewidths=0)
        ax.scatter(x[~good], y[~good], s=10, facecolors="none", edgecolors=color, linewidths=0.7)
    if planar:
        unit_circle(ax)
        ax.autoscale_view()
        ax.set_aspect("equal", adjustable="datalim")
        return finish(ax, font, "Re λ", "Im λ", "Eigenvalues of J")
    known = np.asarray(values[np.isfinite(values)], dtype=float)
    if (known > 0).all():
        ax.set_yscale("log")
        log_limits(ax, known)
    ax.axhline(1, color=GREY, linewidth=0.6, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return finish(ax, font, "index", "singular value", "Singular values of J")


@accepts
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


def _spectrum(spectrum: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    if isinstance(spectrum, StepReport):
        if spectrum.z is None:
            raise ArgumentError(f"{spectrum.name} has no eigenvalues in this report; choose another step")
        values = np.atleast_2d(np.asarray(spectrum.z, dtype=complex) + (spectrum.skip or 0.0))
        return values, np.full(values.shape, spectrum.spectrum_converged)
    if not (hasattr(spectrum, "values") and hasattr(spectrum, "converged")):
        raise ArgumentTypeError(
            f"spectrum is {a(type(spectrum).__name__)}; expected what stabkit.eigenvalues or stabkit.singular_values "
            "returns, or one step of a report"
        )
    values = np.atleast_2d(np.asarray(spectrum.values))
    return values, np.broadcast_to(np.asarray(spectrum.converged, dtype=bool), values.shape)


@accepts
def method(method: LinearStability, ax: Axes | None = None, *, z: ArrayLike | None = None) -> Axes:
    """The stability region of an integrator: where the powers of M(z) stay bounded.

    Args:
        method: a method of ``stabkit.integrators``; all its fields see the same z.
        ax: where to draw; a new figure when None.
        z: points to draw on top, such as the eigenvalues h lambda of a problem; the picture grows to hold them.
    """
    ax, font = new_axes(ax, 8, 7)
    left, right, height = _window(method)
    try:
        points = np.ravel(np.asarray([] if z is None else z, dtype=complex))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"z is {a(type(z).__name__)}; expected complex numbers") from error
    points = points[np.isfinite(points)]
    if points.size:
        left, right = min(left, 1.1 * points.real.min()), max(right, 1.1 * points.real.max())
        height = max(height, 1.1 * float(np.abs(points.imag).max()))
    stable_area(ax, method, (complex(left, -height), complex(right, height)))
    reach = min(float(method.imaginary_interval()), height)
    if reach > 0:
        # the region of leapfrog is nothing but this
        ax.plot([0, 0], [-reach, reach], color=ORANGE, linewidth=1.4)
    complex_plane(ax)
    if points.size:
        ax.scatter(points.real, points.imag, s=9, color=BLUE, linewidths=0, zorder=3)
    ax.set_xlim(left, right)
    ax.set_ylim(-height, height)
    ax.set_aspect("equal")
    return finish(ax, font, "Re z", "Im z", f"Stability region, {verbatim(middle(method.name, 24))}")


def stable_area(ax: Axes, method: LinearStability, frame: tuple[complex, complex], line: str = "-") -> None:
    """Shade where powers of M(z) stay bounded, between two corners, and draw the boundary."""
    low, high = frame
    x, y = np.linspace(low.real, high.real, _GRID), np.linspace(low.imag, high.imag, _GRID)
    with np.errstate(all="ignore"):
        radius = np.nan_to_num(method.amplification(x[None, :] + 1j * y[:, None]), nan=np.inf, posinf=1e300)
    # the logarithm keeps the contour smooth beside poles
    level = np.log(np.maximum(radius, 1e-300))
    ax.contourf(x, y, level, levels=[-1e3, 0.0], colors=[shade(ax)], zorder=-2)
    ax.contour(x, y, level, levels=[0.0], colors=[ink(ax)], linewidths=0.9, linestyles=[line], zorder=1)


def _window(method: LinearStability) -> tuple[float, float, float]:
    """Left, right and upper end of a picture that shows the whole region, or where it starts to be everything."""
    if math.isinf(method.real_interval()) or math.isinf(method.imaginary_interval()):
        return -6.9, 5.0, 4.0
    left, right, _, top = method.region().box
    return min(left, -0.6), max(right, 0.6), max(top, 0.6)
