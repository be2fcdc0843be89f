"""Pictures of Lyapunov and finite-time exponents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from stabkit.plotting.style import DIVERGING, finish, new_axes, sample_color, small_text

if TYPE_CHECKING:
    from stabkit.growth import FiniteTimeExponents, LyapunovSpectrum
    from stabkit.growth.fields import ExponentField

_CURVES = 8  # exponents whose convergence can be told apart


def lyapunov(spectrum: LyapunovSpectrum, ax: Axes | None = None) -> Axes:
    """Lyapunov exponents in falling order with their standard errors; hollow where they have not converged.

    Args:
        spectrum: from ``stabkit.lyapunov_spectrum``; samples have colors of their own.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    values, errors = (np.atleast_2d(_array(v)) for v in (spectrum.exponents, spectrum.standard_errors))
    converged = np.broadcast_to(_array(spectrum.converged).astype(bool).reshape(len(values), -1), values.shape)
    index = np.arange(1, values.shape[1] + 1)
    ax.axhline(0, color="black", linewidth=0.6)
    for sample in range(len(values)):
        color = sample_color(sample, len(values))
        row, error, good = values[sample], np.nan_to_num(errors[sample]), converged[sample]
        ax.vlines(index, row - error, row + error, color=color, linewidth=0.8)
        ax.plot(index[good], row[good], "o", color=color, markersize=3)
        ax.plot(index[~good], row[~good], "o", color=color, markersize=3, markerfacecolor="none", markeredgewidth=0.7)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    title = "Lyapunov exponents" + ("" if converged.all() else " (hollow: NOT converged)")
    return finish(ax, font, "index", "exponent (nats per step)", title)


def lyapunov_convergence(spectrum: LyapunovSpectrum, ax: Axes | None = None, *, sample: int = 0) -> Axes:
    """Running means of the local growth over the steps: where each Lyapunov exponent settles, if it does.

    The band is the exponent with its standard error. At most eight exponents are drawn, evenly spaced.

    Args:
        spectrum: from ``stabkit.lyapunov_spectrum``, with its local growth.
        ax: where to draw; a new figure when None.
        sample: which sample.
    """
    ax, font = new_axes(ax, 8, 6)
    local = _array(spectrum.local_growth)[:, sample]
    exponents, errors = _array(spectrum.exponents)[sample], _array(spectrum.standard_errors)[sample]
    steps, count = local.shape
    shown = np.unique(np.linspace(0, count - 1, min(count, _CURVES)).round().astype(int))
    running = np.cumsum(local, axis=0) / np.arange(1, steps + 1)[:, None]
    ax.axhline(0, color="black", linewidth=0.6)
    for place, k in enumerate(shown):
        color = sample_color(place, len(shown))
        ax.axhspan(exponents[k] - errors[k], exponents[k] + errors[k], color=color, alpha=0.2, linewidth=0)
        ax.plot(np.arange(1, steps + 1), running[:, k], color=color, linewidth=0.9)
        end = (steps, running[-1, k])
        ax.annotate(f"λ{k + 1}", end, (3, 0), textcoords="offset points", va="center", fontsize=font)
    if steps > 200:
        ax.set_xscale("log")
    settled = running[max(steps // 20, 1) :]
    low, high = np.nanmin([settled.min(), 0.0]), np.nanmax([settled.max(), 0.0])
    margin = 0.12 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)  # the first few steps would squeeze all that follows
    return finish(ax, font, "steps", "running mean (nats per step)", "Convergence of the exponents")


def finite_time(found: FiniteTimeExponents, ax: Axes | None = None) -> Axes:
    """Finite-time exponents in falling order, as squares: they are not Lyapunov exponents, which are discs.

    Hollow where they have not converged; those of directions that the product does not have are left out.

    Args:
        found: from ``stabkit.finite_time_exponents``; samples have colors of their own.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    values, converged = _array(found.exponents), _array(found.converged).astype(bool)
    index = np.arange(1, values.shape[1] + 1)
    ax.axhline(0, color="black", linewidth=0.6)
    for sample, (row, good) in enumerate(zip(values, converged, strict=True)):
        color, there = sample_color(sample, len(values)), np.isfinite(row)
        ax.plot(index[there & good], row[there & good], "s", color=color, markersize=3)
        hollow = there & ~good
        ax.plot(index[hollow], row[hollow], "s", color=color, markersize=3, markerfacecolor="none", markeredgewidth=0.7)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    title = "Finite-time exponents" + ("" if converged.all() else " (hollow: NOT converged)")
    return finish(ax, font, "index", "exponent (nats per step)", title)


def exponent_field(field: ExponentField, ax: Axes | None = None, *, index: int = 0) -> Axes:
    """A finite-time exponent over a plane of inputs, as colors: orange separates neighbours, blue brings them together.

    Ridges of the largest exponent are where inputs that start together end up apart (Storm et al., Physical Review
    Letters 132 (2024) 057301).

    Args:
        field: from ``stabkit.growth.exponent_field``.
        ax: where to draw; a new figure when None.
        index: which exponent, 0 for the largest.
    """
    ax, font = new_axes(ax, 8, 6.5, margin=0.02)
    values = _array(field.exponents)[..., index]
    first, second = _array(field.first), _array(field.second)
    image = ax.pcolormesh(first, second, values, cmap=DIVERGING, norm=_around_zero(values), shading="nearest")
    image.set_rasterized(True)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("nats per step", fontsize=font)
    small_text(bar.ax, font)
    ax.set_aspect("equal", adjustable="box")
    title = f"Finite-time exponent {index + 1}, {field.steps} steps"
    return finish(ax, font, "first direction", "second direction", title)


def _around_zero(values: Any) -> TwoSlopeNorm:
    """White at zero, the same color for the same size on both sides."""
    finite = values[np.isfinite(values)]
    reach = float(np.abs(finite).max()) if finite.size else 1.0
    return TwoSlopeNorm(0.0, -(reach or 1.0), reach or 1.0)


def sum_rule(spectrum: LyapunovSpectrum, ax: Axes | None = None) -> Axes:
    """Partial sums of the Lyapunov exponents; where they cross zero is the Kaplan-Yorke dimension.

    Args:
        spectrum: from ``stabkit.lyapunov_spectrum``.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    values = np.atleast_2d(_array(spectrum.exponents))
    ax.axhline(0, color="black", linewidth=0.6)
    index = np.arange(values.shape[1] + 1)
    for sample, row in enumerate(values):
        sums = np.concatenate([[0.0], np.cumsum(row)])
        ax.plot(index, sums, ".-", color=sample_color(sample, len(values)), linewidth=0.9, markersize=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return finish(ax, font, "number of exponents", "sum (nats per step)", "Partial sums of the exponents")


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
