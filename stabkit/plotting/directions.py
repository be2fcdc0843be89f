"""Directions that a flow carries: how they turn towards each other, and the angles between those it keeps apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from stabkit.plotting.style import finish, new_axes, sample_color

if TYPE_CHECKING:
    from stabkit.growth import AlignmentIndex, CovariantVectors


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
