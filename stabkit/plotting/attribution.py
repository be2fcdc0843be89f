"""Where the growth of every step comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from stabkit.arguments import accepts
from stabkit.attribution import Attribution
from stabkit.plotting.depth import FloatArray, depth_axis
from stabkit.plotting.style import BLUE, GREEN, GREY, ORANGE, empty, finish, ink, new_axes

if TYPE_CHECKING:
    from torch import Tensor

    from stabkit.report import Report

_TERMS = ("spectral", "non_normal", "alignment", "transition")
_FLAT = 0.01  # nats that the axis spans at least, so that rounding does not look like growth
_ROUNDING = 1e-12

# reddish purple and orange of the same palette
_COLORS = {"spectral": BLUE, "non_normal": ORANGE, "alignment": "#CC79A7", "masks": "#E69F00", "norms": GREEN}


@accepts
def attribution(result: Report | Attribution, ax: Axes | None = None) -> Axes:
    """The parts of every step's growth, stacked; their sum is the growth, a black line. All in nats.

    Args:
        result: a report, whose steps without attribution are left empty, or what ``stabkit.attribute`` returned.
        ax: where to draw; a new figure when None.

    Example:
        >>> import torch, stabkit
        >>> flow = stabkit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), torch.ones(3, 2))
        >>> attribution(stabkit.attribute(flow)).get_ylabel()
        'growth of a step (nats)'
    """
    ax, font = new_axes(ax, 8, 6.5)
    names, growth, parts = _parts(result)
    where = np.arange(len(names))
    up, down = np.zeros(len(names)), np.zeros(len(names))
    for name, values in parts.items():
        base = np.where(values > 0, up, down)
        words = name.replace("_", "-")
        ax.bar(where, values, 0.75, bottom=base, color=_COLORS.get(name, GREY), label=words, linewidth=0)
        up += np.maximum(values, 0)
        down += np.minimum(values, 0)
    shown = np.isfinite(growth)
    ax.axhline(0, color=ink(ax), linewidth=0.6)
    if parts:
        ax.hlines(growth[shown], where[shown] - 0.42, where[shown] + 0.42, color=ink(ax), linewidth=1.2, label="growth")
        low, high = min(0.0, *down, *growth[shown]), max(0.0, *up, *growth[shown])
        span = max(high - low, _FLAT)
        ax.set_ylim(low - 0.06 * span, high + 0.45 * span)  # room for the legend
        ax.legend(loc="upper center", ncols=2, fontsize=font, handlelength=1, frameon=False, columnspacing=0.9)
    else:
        empty(ax, "no attribution\nin this report", font)
    depth_axis(ax, names, font)
    return finish(ax, font, None, "growth of a step (nats)", "Where the growth comes from")


def _parts(result: Report | Attribution) -> tuple[tuple[str, ...], FloatArray, dict[str, FloatArray]]:
    """Names of the steps, their growth, and the parts that are anywhere more than rounding; means over samples."""
    if isinstance(result, Attribution):
        names = result.names
        growth = _mean(result.growth)
        parts = {name: _mean(getattr(result, name)) for name in _TERMS}
    else:
        steps = result.steps
        names = tuple(step.name for step in steps)
        growth = np.array([step.growth for step in steps], dtype=float)
        found = dict.fromkeys(name for step in steps for name in step.attribution or ())
        parts = {
            name: np.array([(step.attribution or {}).get(name, 0.0) for step in steps], dtype=float) for name in found
        }
    finite = {name: np.where(np.isfinite(values), values, 0.0) for name, values in parts.items()}
    return (
        names,
        growth,
        {name: values for name, values in finite.items() if np.abs(values).max(initial=0.0) > _ROUNDING},
    )


def _mean(values: Tensor) -> FloatArray:
    return np.asarray(values.detach().double().mean(1).cpu().numpy())
