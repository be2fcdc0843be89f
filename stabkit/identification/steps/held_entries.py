"""Steps that a mask confines to some entries: x' = where(m, step(x), x), the others stay what they are."""

from __future__ import annotations

from dataclasses import replace

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.slots import Slots
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, meta_of, operation

_CHOSEN = 2  # values that a mask chooses between
_WHY = "a mask holds some entries as they are: the step is that of the others"


def without_held_entries(around: Surroundings, found: Slots) -> Slots | None:
    """The states of the entries that a mask lets move; None where there is no such mask.

    Args:
        around: the index of the flow.
        found: the states of a step, one of which is an old one in some entries, and new in the others.
    """
    targets = tuple(_moved(around, found, target) or target for target in found.targets)
    return None if targets == found.targets else replace(found, targets=targets)


def _moved(around: Surroundings, found: Slots, target: Value) -> Value | None:
    """What a new state is where it is none of the old ones."""
    given = around.graph.inputs.get(target.node, [])
    if target in found.sources or operation(target.node) != "Where" or len(given) != _CHOSEN:
        return None
    moved = [v for v in given if v not in found.sources]
    return moved[0] if len(moved) == 1 and meta_of(moved[0]).shape == meta_of(target).shape else None


def told_of_mask(record: Identification) -> Identification:
    """A record of the entries that move, which a mask of this pass may be another one of in the next."""
    return replace(record, evidence="measured", notes=(_WHY, *record.notes))
