"""What a report holds of an optimizer's coming updates, and how people see it; knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stabkit.report.formats import figures, percent
from stabkit.report.shown import shown
from stabkit.results import Result


@dataclass(frozen=True, kw_only=True)
class BlockShare:
    """The part of a block in the largest curvature.

    Attributes:
        name: the path of its module; ``""`` for what the model itself holds.
        share: of the steepest direction, from 0 to 1.
        curvature: the largest within the block alone; None where it was not computed.
    """

    name: str
    share: float
    curvature: float | None = None


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Some real updates of copies, on one batch.

    Attributes:
        rate: the learning rate.
        losses: before each update and after the last; it ends where one is not finite.
    """

    rate: float
    losses: tuple[float, ...]


def _curvature(record: TrainingReport) -> str:
    return "" if record.curvature is None else figures(record.curvature, 4)


def _solved(record: TrainingReport) -> str:
    """How far the curvature is known."""
    told = f"residual {figures(record.curvature_residual, 2)}, {'converged' if record.converged else 'NOT converged'}"
    if record.preconditioned is None or record.preconditioned == record.curvature:
        return told
    return (
        f"{told}; preconditioned {figures(record.preconditioned, 4)}, residual "
        f"{figures(record.preconditioned_residual, 2)}"
    )


def _stable(record: TrainingReport) -> str:
    rate = record.largest_stable_rate
    if rate is None:
        return ""
    return "nothing curves upwards" if math.isinf(rate) else f"stable up to a rate of {figures(rate)}"


def _critical(record: TrainingReport) -> str:
    """The critical rate in words."""
    if record.critical_rate is None:
        return ""
    if record.critical_rate == 0:
        return "none: the update raises the loss at any length"
    return "none: the loss still falls at 2^24 times the update" if math.isinf(record.critical_rate) else figures(
        record.critical_rate
    )  # fmt: skip


def _after(record: TrainingReport) -> str:
    return f"along the coming update, after which the loss is {figures(record.loss_after, 4)}"


def _runs(record: TrainingReport) -> str:
    return "; ".join(_run(updates) for updates in record.updates)


def _run(updates: Updates) -> str:
    first, last = updates.losses[0], updates.losses[-1]
    end = f"to {figures(last, 4)}" if math.isfinite(last) else "beyond every bound"
    return f"{len(updates.losses) - 1} at a rate of {figures(updates.rate)}: {figures(first, 4)} {end}"


def _blocks(record: TrainingReport) -> str:
    return ", ".join(f"{b.name or 'the model'} {percent(b.share)}" for b in record.blocks[:3])


def _alone(record: TrainingReport) -> str:
    own = [f"{figures(b.curvature)}" for b in record.blocks[:3] if b.curvature is not None]
    return f"each alone: {', '.join(own)}" if own else ""


@dataclass(frozen=True, kw_only=True)
class TrainingReport(Result):
    """The coming updates of an optimizer on the loss, as steps of an integrator of the gradient flow.

    An update multiplies the weights along an eigenvector of curvature c by M(z) at z = -rate c, with M the stability
    matrix of the optimizer's method; curvatures are those of the Hessian of the loss, preconditioned as the optimizer
    does it. What could not be had is None, and a note says why. See `stabkit.sharpness`.

    Attributes:
        optimizer: the class of the optimizer.
        method: the method that its update is, with what it depends on; None where it has no threshold.
        tableau: the blocks ``A``, ``U``, ``B`` and ``V`` of the method, in rows.
        learning_rate: the present one, of the group with the largest.
        loss: the present loss.
        curvature: the largest eigenvalue of the Hessian.
        curvature_residual: its residual, which bounds the distance to an eigenvalue.
        converged: whether it has converged.
        preconditioned: the largest eigenvalue of P^-1 H, which limits the rate; that of H where P is the identity.
        preconditioned_residual: its residual.
        threshold: the largest curvature that updates bear at the present rate.
        ratio: ``preconditioned`` over ``threshold``; full-batch training hovers at 1 by itself.
        largest_stable_rate: the rate at which the ratio is 1.
        largest_rate_ahead: the largest rate that a schedule has to come; None where none was given.
        steps_to_largest_rate: in how many steps of the schedule.
        schedule: both in words, beside the largest stable rate of now.
        critical_rate: the rate at which the coming update leaves the loss where it is; beyond it, the loss rises.
        loss_after: the loss after the coming update at the present rate.
        blocks: where the steepest direction lies, the largest share first.
        growth_behind: growth of the gradient over the steps behind the first of the blocks, nats.
        depth: that block, its share and how the gradient grew on the way to it, in a sentence.
        updates: real updates, at the present rate where something made it doubtful, then at lower ones that were
            tried beside it, or that a finding proposes.
        n_products: products with the Hessian.
        notes: what could not be had and why, and how it was measured.
    """

    optimizer: str = shown("Optimizer", lambda record: record.optimizer, aside=lambda record: record.method or "")
    method: str | None = None
    tableau: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    learning_rate: float = shown("Learning rate", lambda record: figures(record.learning_rate))
    loss: float | None = shown(
        "Loss", lambda record: "" if record.loss is None else figures(record.loss, 4), default=None
    )
    curvature: float | None = shown("Largest curvature", _curvature, default=None, aside=_solved)
    curvature_residual: float | None = None
    converged: bool = False
    preconditioned: float | None = None
    preconditioned_residual: float | None = None
    threshold: float | None = shown(
        "Threshold",
        lambda record: "" if record.threshold is None else figures(record.threshold, 4),
        default=None,
        aside=lambda record: "the most that updates bear at this rate",
    )
    ratio: float | None = shown(
        "Ratio", lambda record: "" if record.ratio is None else figures(record.ratio), default=None, aside=_stable
    )
    largest_stable_rate: float | None = None
    largest_rate_ahead: float | None = None
    steps_to_largest_rate: int | None = None
    schedule: str = shown("Schedule", lambda record: record.schedule, default="")
    critical_rate: float | None = shown("Critical rate", _critical, default=None, aside=_after)
    loss_after: float | None = None
    blocks: tuple[BlockShare, ...] = shown("Steepest in", _blocks, default=(), aside=_alone)
    growth_behind: float | None = None
    depth: str = shown("In depth", lambda record: record.depth, default="")
    updates: tuple[Updates, ...] = shown(
        "Updates", _runs, default=(), aside=lambda record: "the loss on this batch, by updates of copies"
    )
    n_products: int = 0
    notes: tuple[str, ...] = ()
