"""Norms of gradients and states over depth, of every sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stabkit.plotting.style import BLUE, ORANGE, finish, ink, new_axes

if TYPE_CHECKING:
    from stabkit.growth import GradientProfile

_FAINT = 12  # samples from which lines are drawn finer


def gradient_profile(profile: GradientProfile, ax: Axes | None = None) -> Axes:
    """Powers of ten of the norms of gradient and state, one thin line a sample and a thick one for their mean.

    Dotted lines stand where a random cotangent was drawn anew: the gradients left and right of them do not compare.

    Args:
        profile: from ``stabkit.gradient_profile``.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6)
    with np.errstate(divide="ignore"):
        states = np.log10(profile.state_norms.numpy())
    gradients = profile.log_gradient_norms.numpy() / math.log(10)
    depth = np.arange(len(gradients))
    for logs, color, line, label in ((gradients, BLUE, "-", "gradient"), (states, ORANGE, "--", "state")):
        shown = np.where(np.isfinite(logs), logs, np.nan)
        many = shown.shape[1] > _FAINT
        ax.plot(depth, shown, line, color=color, linewidth=0.4, alpha=0.2 if many else 0.4)
        counted = np.isfinite(shown).sum(1)
        mean = np.where(counted > 0, np.nansum(shown, axis=1) / np.maximum(counted, 1), np.nan)
        ax.plot(depth, mean, line, color=color, linewidth=1.4, label=label)
    for index in profile.restarts:
        ax.axvline(index, color=ink(ax), linestyle=":", linewidth=0.7)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.legend(fontsize=font, borderpad=0.3, framealpha=0.8)
    return finish(ax, font, "state", "log10 of the norm", f"Gradient of {profile.loss}")
