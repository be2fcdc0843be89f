"""Pseudospectra: how far eigenvalues can be trusted, and how much powers may grow before they decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.plotting.style import GREY, ORANGE, color_bar, finish, ink, new_axes, outline, unit_circle

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stabkit.jacobians import Jacobian, NonNormality

_LARGEST = 400  # a resolvent norm at 4000 points takes minutes beyond this size


@accepts
def pseudospectra(
    J: Jacobian,
    ax: Axes | None = None,
    *,
    sample: int = 0,
    levels: Sequence[float] = (-3.0, -2.5, -2.0, -1.5, -1.0, -0.5),
    resolution: int = 64,
) -> Axes:
    r"""Level lines of \|\|(z - J)^-1\|\|^-1 with the eigenvalues and the unit circle.

    The line at epsilon encloses the eigenvalues of all J + E with \|\|E\|\| <= epsilon; where it reaches far out of the
    unit circle while the eigenvalues lie inside, powers of J grow before they decay (Trefethen and Embree, Spectra and
    Pseudospectra, 2005).

    Args:
        J: a square Jacobian of at most 400 coordinates.
        ax: where to draw; a new figure when None.
        sample: which sample.
        levels: log10 of epsilon, rising.
        resolution: points along each side of the picture.

    Raises:
        ArgumentError: J is not square, too large, or not finite.
    """
    from stabkit.jacobians.numerical_range import numerical_range
    from stabkit.jacobians.pseudospectra import Resolvent

    _, m, n = J.shape
    if m != n:
        raise ArgumentError(f"J is {m} x {n}; pseudospectra need a square Jacobian")
    if n > _LARGEST:
        raise ArgumentError(f"J has {n} coordinates, at most {_LARGEST} can be drawn; stabkit.non_normality has bounds")
    A = J.dense()[sample].detach().double().cpu().numpy()
    if not np.isfinite(A).all():
        raise ArgumentError("J has entries that are not finite, so it has no pseudospectra")
    values = np.linalg.eigvals(A)
    boundary, _ = numerical_range(A, 64)
    reach = np.concatenate([boundary, values, [1.0, -1.0, 1.0j, -1.0j]])
    center = complex((reach.real.max() + reach.real.min()) / 2, 0.0)
    half = 1.25 * max(float(np.ptp(reach.real)) / 2, float(np.abs(reach.imag).max()))
    x = np.linspace(center.real - half, center.real + half, resolution)
    y = np.linspace(0.0, half, resolution // 2 + 1)  # J is real, so the picture is symmetric
    resolvent = Resolvent(A)
    upper = np.array([[resolvent.smallest(complex(a, b)) for a in x] for b in y])
    with np.errstate(divide="ignore"):
        level = np.log10(np.concatenate([upper[:0:-1], upper]))
    ax, font = new_axes(ax, 8, 7, margin=0.04)
    colors: dict[str, Any] = {"cmap": "viridis", "norm": Normalize(min(levels) - 0.25, max(levels) + 0.25)}
    ax.contour(x, np.concatenate([-y[:0:-1], y]), level, levels=sorted(levels), linewidths=0.8, **colors)
    _eigenvalues(ax, values, boundary)
    color_bar(ax, ScalarMappable(colors["norm"], colors["cmap"]), "log10 ε", font, ticks=sorted(levels))
    ax.set_aspect("equal")
    return finish(ax, font, "Re z", "Im z", "Pseudospectra, dashed: numerical range")


@accepts
def numerical_range(result: NonNormality, ax: Axes | None = None, *, sample: int = 0) -> Axes:
    """Eigenvalues inside the numerical range, and the unit circle.

    Of a normal J the range (dashed) is the convex hull of the eigenvalues; what it has beyond that, and beyond the unit
    circle, is what powers of J may grow by before they decay. The numbers in the title say how far they do.

    Args:
        result: from ``stabkit.non_normality``.
        ax: where to draw; a new figure when None.
        sample: which sample.
    """
    ax, font = new_axes(ax, 8, 7)
    values, boundary = result.eigenvalues[sample].numpy(), result.numerical_range[sample].numpy()
    _eigenvalues(ax, values, boundary)
    ax.autoscale_view()
    ax.set_aspect("equal", adjustable="datalim")
    largest, at = float(result.max_power_norm[sample]), int(result.max_power_at[sample])
    words = f"max ‖J^k‖ = {largest:.3g} at k = {at}"
    return finish(ax, font, "Re z", "Im z", f"Numerical range, {words}")


def _eigenvalues(ax: Axes, values: NDArray[np.complex128], boundary: NDArray[np.complex128]) -> None:
    """Eigenvalues in their numerical range, with the unit circle."""
    outline(ax, boundary, ORANGE)
    unit_circle(ax)
    ax.plot(values.real, values.imag, ".", color=ink(ax), markersize=2.5)
    ax.axhline(0, color=GREY, linewidth=0.4, zorder=0)
