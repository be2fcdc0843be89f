"""Pictures of Lyapunov and finite-time exponents, and of the directions that a flow carries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.plotting.style import (
    DIVERGING,
    around_zero,
    color_bar,
    figure_of,
    finish,
    ink,
    new_axes,
    sample_color,
)
from stabkit.report import Exponents, Report

if TYPE_CHECKING:
    from stabkit.growth import FiniteTimeExponents, LyapunovSpectrum
    from stabkit.growth.fields import ExponentField

_CURVES = 8  # exponents whose convergence can be told apart
_BARS = 20  # exponents whose error bars can; of more there is a band
_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 0.7}
_LINE = 1.3  # height of a line of text in its own size
if TYPE_CHECKING:
    from stabkit.growth import AlignmentIndex, CovariantVectors


def lyapunov(spectrum: LyapunovSpectrum | Report, ax: Axes | None = None) -> Axes:
    """Lyapunov exponents in falling order with their standard errors; hollow where they have not converged.

    Args:
        spectrum: from ``stabkit.lyapunov_spectrum``, or a report that has exponents; samples have colors of their own.
        ax: where to draw; a new figure when None.
    """
    found = _exponents(spectrum)
    return _falling(found, _array(found.standard_errors), ax, "o", "Lyapunov exponents")


def lyapunov_convergence(spectrum: LyapunovSpectrum | Report, ax: Axes | None = None, *, sample: int = 0) -> Axes:
    """Running means of the local growth over the steps: where each Lyapunov exponent settles, if it does.

    The band is the exponent with its standard error. At most eight exponents are drawn, evenly spaced.

    Args:
        spectrum: from ``stabkit.lyapunov_spectrum``, or a report that has exponents.
        ax: where to draw; a new figure when None.
        sample: which sample.
    """
    ax, font = new_axes(ax, 8, 6)
    found = _exponents(spectrum)
    local = _array(found.local_growth)[:, sample]
    exponents, errors = _array(found.exponents)[sample], _array(found.standard_errors)[sample]
    steps, count = local.shape
    shown = np.unique(np.linspace(0, count - 1, min(count, _CURVES)).round().astype(int))
    running = np.cumsum(local, axis=0) / np.arange(1, steps + 1)[:, None]
    ax.axhline(0, color=ink(ax), linewidth=0.6)
    for place, k in enumerate(shown):
        color = sample_color(ax, place, len(shown))
        ax.axhspan(exponents[k] - errors[k], exponents[k] + errors[k], color=color, alpha=0.2, linewidth=0)
        ax.plot(np.arange(1, steps + 1), running[:, k], color=color, linewidth=0.9)
    if steps > 200:
        ax.set_xscale("log")
    settled = running[max(steps // 5, 1) - 1 :]
    settled = settled[np.isfinite(settled)]
    low, high = settled.min(initial=0.0), settled.max(initial=0.0)
    margin = 0.12 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)  # the first few steps would squeeze all that follows
    _name_curves(ax, [(int(k), float(running[-1, k])) for k in shown], steps, font)
    return finish(ax, font, "steps", "running mean (nats per step)", "Convergence of the exponents")


@accepts
def finite_time(found: FiniteTimeExponents, ax: Axes | None = None) -> Axes:
    """Finite-time exponents in falling order, as squares: they are not Lyapunov exponents, which are discs.

    Hollow where they have not converged; those of directions that the product does not have are left out.

    Args:
        found: from ``stabkit.finite_time_exponents``; samples have colors of their own.
        ax: where to draw; a new figure when None.
    """
    return _falling(found, None, ax, "s", "Finite-time exponents")


def _falling(
    found: LyapunovSpectrum | Exponents | FiniteTimeExponents,
    errors: Any,
    ax: Axes | None,
    marker: str,
    title: str,
) -> Axes:
    """Exponents of every sample by their index, with bars or a band for their errors where there are any."""
    ax, font = new_axes(ax, 8, 6)
    values = np.atleast_2d(_array(found.exponents))
    converged = np.broadcast_to(_array(found.converged).astype(bool).reshape(len(values), -1), values.shape)
    samples, count = values.shape
    reach = np.zeros(values.shape) if errors is None else np.nan_to_num(np.atleast_2d(errors))
    ax.axhline(0, color=ink(ax), linewidth=0.6)
    for sample, (row, error) in enumerate(zip(values, reach, strict=True)):
        color = sample_color(ax, sample, samples)
        # side by side, so that what is drawn of one sample does not hide another
        index = np.arange(1, count + 1) + (sample - (samples - 1) / 2) * min(0.12, 0.6 / samples)
        if errors is not None and count > _BARS:
            ax.fill_between(index, row - error, row + error, color=color, alpha=0.2, linewidth=0)
        elif errors is not None:
            ax.vlines(index, row - error, row + error, color=color, linewidth=0.8)
        for good, look in ((True, {}), (False, _HOLLOW)):
            shown = np.isfinite(row) & (converged[sample] == good)
            ax.plot(index[shown], row[shown], marker, color=color, markersize=3, **look)
    ax.set_xlim(0.5, count + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    title += "" if converged.all() else ", hollow: NOT converged"
    return finish(ax, font, "index", "exponent (nats per step)", title)


def _name_curves(ax: Axes, ends: list[tuple[int, float]], steps: int, font: float | None) -> None:
    """Names behind the ends of the curves; of ends too close to be told apart, one."""
    low, high = ax.get_ylim()
    height = figure_of(ax).get_size_inches()[1] * 72 * 0.7  # about what the labels take is not in the Axes
    apart = _LINE * (font or 10.0) / height * (high - low)
    taken = math.inf
    for k, end in ends:
        if math.isfinite(end) and abs(taken - end) >= apart:
            ax.annotate(f"λ{k + 1}", (steps, end), (3, 0), textcoords="offset points", va="center", fontsize=font)
            taken = end


@accepts
def exponent_field(field: ExponentField, ax: Axes | None = None, *, index: int = 0) -> Axes:
    """A finite-time exponent over a plane of inputs, as colors: orange separates neighbours, blue brings them together.

    Ridges of the largest exponent are where inputs that start together end up apart (Storm et al., Physical Review
    Letters 132 (2024) 057301).

    Args:
        field: from ``stabkit.growth.exponent_field``.
        ax: where to draw; a new figure when None.
        index: which exponent, 0 for the largest.
    """
    ax, font = new_axes(ax, 8, 6.5, margin=0.06)
    values = _array(field.exponents)[..., index]
    first, second = _array(field.first), _array(field.second)
    image = ax.pcolormesh(first, second, values, cmap=DIVERGING, norm=around_zero(values), shading="nearest")
    image.set_rasterized(True)
    color_bar(ax, image, "nats per step", font)
    ax.set_aspect("equal", adjustable="box")
    title = f"Finite-time exponent {index + 1}, {field.steps} steps"
    return finish(ax, font, "first direction (input units)", "second direction (input units)", title)


def sum_rule(spectrum: LyapunovSpectrum | Report, ax: Axes | None = None) -> Axes:
    """Partial sums of the Lyapunov exponents; where they cross zero is the Kaplan-Yorke dimension.

    Args:
        spectrum: from ``stabkit.lyapunov_spectrum``, or a report that has exponents.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    values = np.atleast_2d(_array(_exponents(spectrum).exponents))
    ax.axhline(0, color=ink(ax), linewidth=0.6)
    index = np.arange(values.shape[1] + 1)
    for sample, row in enumerate(values):
        sums = np.concatenate([[0.0], np.cumsum(row)])
        ax.plot(index, sums, ".-", color=sample_color(ax, sample, len(values)), linewidth=0.9, markersize=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return finish(ax, font, "number of exponents", "sum (nats per step)", "Partial sums of the exponents")


def _exponents(result: LyapunovSpectrum | Report) -> LyapunovSpectrum | Exponents:
    if not isinstance(result, Report):
        if not hasattr(result, "local_growth"):
            raise ArgumentTypeError(
                f"{type(result).__name__} is no Lyapunov spectrum, so it has no running means or partial sums; draw it "
                "with stabkit.plotting.finite_time"
            )
        return result
    if result.lyapunov is None:
        raise ArgumentError("the report has no Lyapunov exponents; analyze computes them unless spectrum='none'")
    return result.lyapunov


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


@accepts
def alignment_index(index: AlignmentIndex, ax: Axes | None = None) -> Axes:
    """Powers of ten of the volume that deviation vectors span: a straight fall is chaos, a level line a torus.

    Args:
        index: from ``stabkit.growth.alignment_index``; samples have colors of their own.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    logs = index.log_volume.numpy() / math.log(10)
    for sample in range(logs.shape[1]):
        ax.plot(np.arange(len(logs)), logs[:, sample], color=sample_color(ax, sample, logs.shape[1]), linewidth=0.9)
    chaotic = int(index.chaotic.sum())
    return finish(
        ax, font, "step", f"log10 GALI{index.order}", f"Alignment index: {chaotic} of {logs.shape[1]} chaotic"
    )


@accepts
def covariant_angles(vectors: CovariantVectors, ax: Axes | None = None, *, first: int = 0, second: int = 1) -> Axes:
    """How often two covariant Lyapunov vectors stand at which angle: values near zero are near-tangencies.

    Args:
        vectors: from ``stabkit.growth.covariant_vectors``.
        ax: where to draw; a new figure when None.
        first: one of the vectors, from 0.
        second: the other.
    """
    ax, font = new_axes(ax, 8, 6)
    angles = vectors.angles(first, second).numpy()
    bins = np.linspace(0, math.pi / 2, 31)
    for sample in range(angles.shape[1]):
        color = sample_color(ax, sample, angles.shape[1])
        ax.hist(angles[:, sample], bins=bins.tolist(), density=True, histtype="step", color=color, linewidth=0.9)
    ax.set_xlim(0, math.pi / 2)
    title = f"Covariant vectors {first + 1} and {second + 1}"
    return finish(ax, font, "angle (radians)", "density over states", title)
