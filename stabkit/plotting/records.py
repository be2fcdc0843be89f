"""A training run as its monitor saw it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stabkit.arguments import a
from stabkit.errors import ArgumentError, ArgumentTypeError, did_you_mean
from stabkit.plotting.style import (
    BLUE,
    DIVERGING,
    GREY,
    ORANGE,
    around_zero,
    color_bar,
    end_of,
    finish,
    ink,
    log_limits,
    new_axes,
    shade,
)

_RATIO = "sharpness_ratio"
_LOSS = "loss"
_LOG_Z = "log_z"
_NAMES = 12  # rows that can carry a name
_COUNTED = {"growth", "gain"}  # quantities around zero, in nats
_SHARES = {"attention_entropy", "epsilon_share"}  # from 0 to 1
_RARE = {"update_ratio", "attention_logit", "parameter_norm", *_SHARES}  # not looked at in every record


def training(records: Any, ax: Axes | None = None, *, quantity: str = "growth") -> Axes:
    """A heat map of one quantity of every block over the training steps; a cross where findings were raised.

    Args:
        records: a monitor, its records, or what ``stabkit.monitor.read_records`` gives.
        ax: where to draw; a new figure when None.
        quantity: a number that the blocks have; ``"growth"`` is drawn as it is (orange grows, blue shrinks), a norm or
            ratio as its log10, a share as it is. Curves of the whole model are ``"sharpness_ratio"`` beside the edge of
            stability, ``"loss"``, and ``"log_z"``, the log of the softmax normaliser in it.

    Raises:
        ArgumentError: there is no record, or its blocks have no such number.
    """
    given = getattr(records, "records", records)
    seen = list(given) if isinstance(given, Sequence | Iterator) else [given]
    if not all(isinstance(one, Mapping) or hasattr(one, "to_dict") for one in seen):
        raise ArgumentTypeError(
            f"records is {a(type(records).__name__)}; expected a stabkit.Monitor, its records, or what "
            "stabkit.monitor.read_records returns"
        )
    plain = [record if isinstance(record, Mapping) else record.to_dict() for record in seen]
    if not all({"step", "blocks"} <= record.keys() for record in plain):
        raise ArgumentError("records holds what is no record of a monitor: each has a 'step' and its 'blocks'")
    if not plain:
        raise ArgumentError("records is empty; a picture of a training run needs at least one record")
    if quantity == _RATIO:
        return _edge_of_stability(plain, ax)
    if quantity == _LOSS:
        return _loss(plain, ax)
    if quantity == _LOG_Z:
        return _normaliser(plain, ax)
    names = list(dict.fromkeys(block["name"] for record in plain for block in record["blocks"]))
    known = [key for key in (plain[0]["blocks"] or [{}])[0] if key not in ("name", "non_finite")]
    if quantity not in known:
        guess = did_you_mean(quantity, (*known, _LOSS, _RATIO, _LOG_Z))
        raise ArgumentError(
            f"quantity={quantity!r}; the blocks have {', '.join(known)}, the model {_LOSS}, {_RATIO}, {_LOG_Z}{guess}"
        )
    values = np.full((len(names), len(plain)), np.nan)
    for column, record in enumerate(plain):
        for block in record["blocks"]:
            values[names.index(block["name"]), column] = float(block[quantity])
    steps = np.array([record["step"] for record in plain], dtype=float)
    ax, font = new_axes(ax, 9, 6.5)
    look: dict[str, Any] = {"cmap": "viridis"}
    label = quantity.replace("_", " ")
    if quantity in _COUNTED:
        look = {"cmap": DIVERGING, "norm": around_zero(values, 0.99)}
        label += " (nats)"
    elif quantity in _SHARES:
        look = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values)
        values[~np.isfinite(values)] = np.nan
        label = f"log10 {label}"
    looked = ~np.isnan(values).all(0) if quantity in _RARE else np.ones(len(steps), dtype=bool)
    looked = looked if looked.any() else ~looked  # a look stands for the records about it
    edges, values = _edges(steps[looked]), values[:, looked]
    image = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, values, rasterized=True, **look)
    cross = ink(ax)
    ax.set_facecolor("#DDDDDD")  # what was not measured
    raised = [step for step, record in zip(steps, plain, strict=True) if record["findings"]]
    ax.plot(raised, np.full(len(raised), -0.5), "x", color=cross, markersize=4, clip_on=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(*_edges(steps)[[0, -1]])
    every = -(-len(names) // _NAMES)
    ax.set_yticks(range(0, len(names), every), [end_of(name, 16) for name in names[::every]])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    color_bar(ax, image, label, font)
    title = f"{quantity.replace('_', ' ').capitalize()} of every block" + (" (×: findings)" if raised else "")
    return finish(ax, font, "training step", "block (input on top)", title)


def _loss(records: Sequence[Mapping[str, Any]], ax: Axes | None) -> Axes:
    """The loss, on a logarithmic axis where it is positive over a decade; what is not finite is marked at the top."""
    steps = np.array([record["step"] for record in records], dtype=float)
    losses = np.array([float(record["loss"]) for record in records])
    if np.isnan(losses).all():
        raise ArgumentError("the records hold no loss; give it to monitor.step(loss)")
    finite = np.isfinite(losses)
    ax, font = new_axes(ax, 9, 5.5)
    ax.plot(steps, np.where(finite, losses, np.nan), color=BLUE, marker=".", markersize=3)
    if finite.any() and losses[finite].min() > 0 and losses[finite].max() > 10 * losses[finite].min():
        ax.set_yscale("log")
        log_limits(ax, losses[finite])
    return finish(ax, font, "training step", "loss", "Loss" + _findings_on_top(records, steps, ax))


def _findings_on_top(records: Sequence[Mapping[str, Any]], steps: np.ndarray, ax: Axes) -> str:
    """Crosses along the top edge of a curve over all records, and what its title says of them."""
    told = np.array([bool(record["findings"]) for record in records])
    ax.set_xlim(*_edges(steps)[[0, -1]])
    across = ax.get_xaxis_transform()  # where the curve is not finite, it has no height
    ax.plot(steps[told], np.ones(told.sum()), "x", color=ORANGE, markersize=5, transform=across, clip_on=False)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return " (×: findings)" if told.any() else ""


def _normaliser(records: Sequence[Mapping[str, Any]], ax: Axes | None) -> Axes:
    """The mean log of the softmax normaliser in the loss, where it was looked at."""
    steps = np.array([record["step"] for record in records], dtype=float)
    values = np.array([float(record.get(_LOG_Z, np.nan)) for record in records])
    seen = np.isfinite(values)
    if not seen.any():
        raise ArgumentError("the records hold no log_z; it is seen where the loss takes a softmax of an output")
    ax, font = new_axes(ax, 9, 5.5)
    ax.axhline(0.0, color=GREY, linewidth=1)
    ax.plot(steps[seen], values[seen], color=BLUE, marker=".", markersize=3)
    found = _findings_on_top(records, steps, ax)
    return finish(ax, font, "training step", "mean log Z", "Log of the softmax normaliser in the loss" + found)


def _edge_of_stability(records: Sequence[Mapping[str, Any]], ax: Axes | None) -> Axes:
    """The ratio of the sharpness to the optimizer's threshold, with the band in which training hovers."""
    looks = [(record["sharpness"], bool(record["findings"])) for record in records if record.get("sharpness")]
    if not looks:
        raise ArgumentError("the records hold no sharpness; give the monitor closure=, which returns a loss")
    steps = [int(look["step"]) for look, _ in looks]
    ratios = np.array([float(look["ratio"]) for look, _ in looks])
    ratios[~(ratios > 0)] = np.nan  # nothing curves upwards
    ax, font = new_axes(ax, 9, 5.5)
    ax.axhspan(0.8, 1.2, color=shade(ax), zorder=0)
    ax.axhline(1.0, color=GREY, linewidth=1)
    ax.plot(steps, ratios, color=BLUE, marker=".", markersize=3)
    raised = [i for i, (_, told) in enumerate(looks) if told]
    ax.plot([steps[i] for i in raised], ratios[raised], "x", color=ORANGE, markersize=5)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    title = "Sharpness over what the learning rate bears" + (" (×: findings)" if raised else "")
    return finish(ax, font, "training step", "ratio to the threshold", title)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns: half way between steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
