"""What moved in a record, in the words of findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stabkit.diagnosis import Finding, factor
from stabkit.monitor.record import Record
from stabkit.monitor.series import Move

_WORDS = {"growth": "gradient growth", "gain": "activation gain", "total": "log of the gradient norm"}


@dataclass(frozen=True, kw_only=True)
class Mover(Move):
    """One quantity of one block that left its usual range; values are in nats.

    Attributes:
        step: the training step.
        name: path of the block; empty for the model as a whole.
        index: place of the block in the record; -1 for the model as a whole.
        field: ``growth``, ``gain``, ``total`` or ``non_finite``.
    """

    step: int
    name: str
    index: int
    field: str

    @property
    def kind(self) -> str:
        """The kind of finding."""
        return "exploding" if self.value > self.usual else "vanishing"

    @property
    def change(self) -> float:
        """How far it moved, in nats."""
        return self.value - self.usual


def first_mover(movers: Sequence[Mover]) -> Mover:
    """The earliest block in the forward pass of those that moved far.

    A block that changes leaves all before it as they were in the forward pass, and after it anything may follow.
    """
    far = max(abs(mover.change) for mover in movers if mover.index >= 0 or len(movers) == 1)
    return next(mover for mover in movers if abs(mover.change) >= 0.5 * far)


def moved_finding(mover: Mover, others: Sequence[Mover], first: Mover) -> Finding:
    """The finding on a mover.

    Args:
        mover: the block that the finding names, one of those that moved alike at this step.
        others: all blocks that moved so.
        first: what moved first in this episode.
    """
    where = mover.name or "the model"
    evidence = (
        f"{mover.what} at training step {mover.step}: {_WORDS[mover.field]} of {where} is {mover.value:+.2f} nats, "
        f"usually {mover.usual:+.2f} (a factor of {factor(mover.change)})"
    )
    beside = sorted({other.name for other in others if other.index >= 0} - {mover.name})
    evidence += f"; so do {len(beside)} other blocks" if len(beside) > 1 else "".join(f"; so does {b}" for b in beside)
    evidence += _began(first, mover.step, mover.name)
    return Finding(
        kind=mover.kind,
        severity="critical" if abs(mover.change) > math.log(100.0) else "warning",
        steps=tuple(sorted({other.index for other in others if other.index >= 0})),
        module_path=mover.name,
        confidence=1.0 - 1.0 / (1.0 + mover.size**2),
        evidence=evidence,
        remedy=_remedy(mover, where, first),
        reference="",
        numbers={
            "training_step": float(mover.step),
            "value": mover.value,
            "usual": mover.usual,
            "deviations": mover.size if mover.what == "spike" else math.nan,
        },
    )


def _remedy(mover: Mover, where: str, first: Mover) -> str:
    if first.name and first.name != mover.name and first.step <= mover.step:
        return f"see to {first.name} first: it moved first, and what {where} does may follow from that"
    if mover.field == "total":
        return "look at the batch and the loss of this step; clip the gradient or lower the learning rate"
    if mover.what == "drift":
        return f"lower the learning rate of {where}, decay its weights, or normalise its output"
    return (
        f"undo what changed {where} since the last quiet record: clip the gradient or lower the learning rate, and go "
        "back to an earlier checkpoint"
    )


def _began(first: Mover, step: int, name: str) -> str:
    if (first.step, first.name) == (step, name):
        return ""
    return f"; {first.name or 'the model as a whole'} moved first, at training step {first.step}"


def non_finite_finding(record: Record, first: Mover | None) -> Finding:
    """The finding on NaN or infinity; names the tensor where it began.

    Args:
        record: the record of the step.
        first: what moved first in this episode, before it.
    """
    if record.broken_weights:
        return _broken_weights(record, first)
    index, what, text = _first_non_finite(record)
    name = record.blocks.names[index] if index >= 0 else ""
    evidence = f"at training step {record.step} {text}; {record.non_finite} in all are not"
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=(index,) if index >= 0 else (),
        module_path=name,
        confidence=1.0,
        evidence=evidence + ("" if first is None else _began(first, record.step, name)),
        remedy=f"look at {what} first: it is the first that is not finite; lower the learning rate or "
        "clip the gradient, and analyse the capsule of this step",
        reference="",
        numbers={"training_step": float(record.step), "count": float(record.non_finite)},
    )


def _broken_weights(record: Record, first: Mover | None) -> Finding:
    """The finding where the weights are not finite: which output comes first says nothing then, the update before does.

    Where all blocks have broken, none of them is named but the one that had moved before.
    """
    names, broken = record.blocks.names, record.broken_weights
    every = len(broken) > 1 and len(broken) == sum(norm > 0 or not norm <= 0 for norm in record.blocks.norms[3])
    name = (first.name if first is not None else "") if every else broken[0]
    whose = f"all {len(broken)} blocks" if every else ", ".join(broken[:4]) + (" and more" if len(broken) > 4 else "")
    return Finding(
        kind="non_finite",
        severity="critical",
        steps=tuple(i for i, each in enumerate(names) if each in broken),
        module_path=name,
        confidence=1.0,
        evidence=f"at training step {record.step} the weights of {whose} are not finite: an update or a change before "
        f"this step made them so" + ("" if first is None else _began(first, record.step, name)),
        remedy="go back to a checkpoint before, lower the learning rate or clip the gradient, and analyse the capsule",
        reference="",
        numbers={"training_step": float(record.step), "count": float(record.non_finite)},
    )


def _first_non_finite(record: Record) -> tuple[int, str, str]:
    """The block where it began, what to look at, and how it was seen.

    Outputs in the order of the forward pass, then the loss, then gradients back from it.
    """
    names = record.blocks.names
    output, gradient, parameter_gradient = record.blocks.bad
    if output.any():
        index = int(output.argmax())
        name = names[index] or "the model"
        if record.handed != names[index]:
            after = f", and that of {names[index - 1]} before it is" if index else ""
            return index, f"the output of {name}", f"the output of {name} is not finite{after}"
        if index == 0:
            where = f"what comes before {name}"
            return 0, where, f"what {name} is given is not finite, and it is the first block: look at the batch"
        before = names[index - 1]
        where = f"what stands between {before} and {name}"
        return index - 1, where, f"what {name} is given is not finite, and the output of {before} before it is"
    if record.loss_is_broken:
        return -1, "the loss of the model", "the loss of the model is not finite"
    for index in reversed(range(len(names))):
        name = names[index] or "the model"
        if gradient[index] and index + 1 < len(names) and math.isfinite(record.blocks.norms[1][index + 1]):
            after = names[index + 1]
            where = f"the backward pass of {after}, and what stands between it and {name}"
            return (
                index + 1,
                where,
                f"the gradient of {name} is not finite, and that of {after}, from which it comes, is",
            )
        if gradient[index] or parameter_gradient[index]:
            what = "gradient" if gradient[index] else "parameter gradient"
            return index, f"the {what} of {name}", f"the {what} of {name} is not finite"
    what = "the gradient of a parameter outside the blocks"
    return -1, what, f"{what} is not finite"
