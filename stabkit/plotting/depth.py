"""What is drawn over depth, taken from a report or from a gradient profile, and the axis that it is drawn along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stabkit.growth import GradientProfile
from stabkit.plotting.style import end_of
from stabkit.statistics import interval_of_mean

if TYPE_CHECKING:
    from stabkit.report import Report

FloatArray: TypeAlias = npt.NDArray[np.float64]

MANY_STEPS = 12  # up to here the depth axis carries names
_SHORT = 3  # characters of a name that needs no rotation


@dataclass(frozen=True)
class Norms:
    """A norm at every state.

    Attributes:
        values: ``(states,)``, geometric means over samples.
        ends: ``(states, 2)``, of their intervals; NaN where there is none.
        powers: ``(states,)``, log10 of the values where some are beyond the range of a float; None where none is.
    """

    values: FloatArray
    ends: FloatArray
    powers: FloatArray | None = None


@dataclass(frozen=True)
class Depth:
    """Growth of every step and norms at every state.

    Attributes:
        names: the names of the steps.
        kinds: ``"step"`` or ``"transition"``.
        growth: ``(steps,)``, nats, means over samples.
        ends: ``(steps, 2)``, of the intervals of ``growth``.
        gradient: the norms of the gradient.
        state: the norms of the states.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    growth: FloatArray
    ends: FloatArray
    gradient: Norms
    state: Norms


def over_depth(result: Report | GradientProfile) -> Depth:
    """The numbers of a report, or those of a profile as means over its samples with 95 % intervals."""
    return _of_profile(result) if isinstance(result, GradientProfile) else _of_report(result)


def _of_report(report: Report) -> Depth:
    steps = report.steps
    none = (np.nan, np.nan)
    last = np.nan
    if steps:
        with np.errstate(all="ignore"):  # reports written earlier do not have the last norm
            known = steps[-1].gradient_norm * np.exp(-steps[-1].growth)
        last = known if report.output_gradient_norm is None else report.output_gradient_norm
    gradient = [*(step.gradient_norm for step in steps), *([last] if steps else [])]
    gradient_ends = [*(s.gradient_norm_interval or none for s in steps), report.output_gradient_norm_interval or none]
    end = np.nan if report.output_state_norm is None else report.output_state_norm
    state = [*(step.state_norm for step in steps), *([end] if steps else [])]
    state_ends = [*(s.state_norm_interval or none for s in steps), report.output_state_norm_interval or none]
    return Depth(
        tuple(step.name for step in steps),
        tuple(step.kind for step in steps),
        np.array([step.growth for step in steps], dtype=float),
        np.array([step.growth_interval for step in steps], dtype=float).reshape(-1, 2),
        Norms(np.array(gradient, dtype=float), np.array(gradient_ends[: len(gradient)], dtype=float).reshape(-1, 2)),
        Norms(np.array(state, dtype=float), np.array(state_ends[: len(state)], dtype=float).reshape(-1, 2)),
    )


def _of_profile(profile: GradientProfile) -> Depth:
    growth = profile.log_growth.detach().double().cpu().numpy()
    names = tuple(str(index) for index in range(len(growth)))
    return Depth(
        names,
        ("step",) * len(names),
        growth.mean(axis=1),
        _interval(growth),
        _geometric(profile.log_gradient_norms.detach().double().cpu().numpy()),
        _geometric(profile.state_norms.detach().double().cpu().log().numpy()),
    )


def _interval(rows: FloatArray) -> FloatArray:
    """The 95 % interval of the mean over columns; NaN for one column."""
    if rows.shape[1] < 2:
        return np.full((len(rows), 2), np.nan)
    with np.errstate(all="ignore"):
        return np.stack(interval_of_mean(rows.T), axis=1)


def _geometric(logs: FloatArray) -> Norms:
    """Geometric means over samples, from natural logs ``(states, samples)``."""
    with np.errstate(all="ignore"):
        means = logs.mean(axis=1)
        values = np.exp(means)
        lost = np.isfinite(means) & ((values == 0) | np.isinf(values))
        return Norms(values, np.exp(_interval(logs)), means / np.log(10) if lost.any() else None)


def depth_axis(ax: Axes, names: tuple[str, ...], font: float | None) -> None:
    """Names of the steps while they fit, their indices beyond; input on the left."""
    n = len(names)
    ax.set_xlim(-0.7, max(n, 1) - 0.3)
    ax.set_xlabel("step (input left, output right)", fontsize=font)
    if n > MANY_STEPS or n == 0:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return
    labels = [end_of(name, 13) for name in names]
    if max(map(len, labels)) <= _SHORT:
        ax.set_xticks(range(n), labels)
        return
    ax.set_xticks(range(n), labels, rotation=60, ha="right", rotation_mode="anchor")
    for tick in ax.get_xticklabels():
        if font is not None:
            tick.set_fontsize(font - 1)
