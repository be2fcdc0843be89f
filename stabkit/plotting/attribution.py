"""Where the growth of every step comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from stabkit.plotting.profile import depth_axis
from stabkit.plotting.style import BLUE, GREEN, GREY, ORANGE, finish, new_axes

if TYPE_CHECKING:
    from stabkit.report import Report

# reddish purple and orange of the same palette
_COLORS = {"spectral": BLUE, "non_normal": ORANGE, "alignment": "#CC79A7", "masks": "#E69F00", "norms": GREEN}


def attribution(report: Report, ax: Axes | None = None) -> Axes:
    """The parts of every step's growth, stacked; their sum is the growth, a black line. All in nats.

    Args:
        report: a report; its steps without attribution are left empty.
        ax: where to draw; a new figure when None.
    """
    ax, font = new_axes(ax, 8, 6.5)
    steps = report.steps
    names = list(dict.fromkeys(name for step in steps for name in step.attribution or ()))
    where = np.arange(len(steps))
    up, down = np.zeros(len(steps)), np.zeros(len(steps))
    for name in names:
        values = np.array([(step.attribution or {}).get(name, 0.0) for step in steps], dtype=float)
        values = np.where(np.isfinite(values), values, 0.0)
        if not values.any():
            continue
        base = np.where(values > 0, up, down)
        words = name.replace("_", "-")
        ax.bar(where, values, 0.75, bottom=base, color=_COLORS.get(name, GREY), label=words, linewidth=0)
        up += np.maximum(values, 0)
        down += np.minimum(values, 0)
    growth = np.array([step.growth for step in steps], dtype=float)
    shown = np.isfinite(growth)
    ax.hlines(growth[shown], where[shown] - 0.42, where[shown] + 0.42, color="black", linewidth=1.2, label="growth")
    ax.axhline(0, color="black", linewidth=0.6)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    if names:
        ax.legend(loc="upper center", ncols=2, fontsize=font, handlelength=1, frameon=False, columnspacing=0.9)
    else:
        ax.text(0.5, 0.5, "no attribution\nin this report", transform=ax.transAxes, ha="center", fontsize=font)
    depth_axis(ax, report, font)
    return finish(ax, font, None, "nats", "Where the growth comes from")
