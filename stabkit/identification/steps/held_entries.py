"""Steps that a mask confines to some entries: x' = where(m, step(x), x), the others stay what they are."""

from __future__ import annotations

from dataclasses import replace

from stabkit.identification.form.coefficients import Coefficient, LinearCombination
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.slots import Slots
from stabkit.identification.record import Identification, nothing
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


def skip_of_some(
    around: Surroundings, found: Slots, steps: tuple[int, ...], total: Coefficient | None
) -> Identification:
    """The record of a step whose skip is no number times the state: one of some entries alone, or none.

    A mask that is no number of the input chooses in a clockwork network which units are made anew at a time step, while
    the others stay what they are.

    Args:
        around: the index of the flow.
        found: the old and the new state.
        steps: the steps of the flow that make up the step.
        total: what of the old state reaches the new one along linear paths.
    """
    same = meta_of(found.sources[0]).shape == meta_of(found.targets[0]).shape
    if total is None or total.kind != "part" or not same:
        return nothing(steps, "not a step", "the skip moves, mixes or drops coordinates", "measured")
    combined = LinearCombination(around.whole(steps[0], steps[-1] + 1, found), found.targets[0])
    factors = {atom: t for atom, t in combined.factors.items() if t.shape == combined.factors[found.sources[0]].shape}
    kept = factors.pop(found.sources[0]) != 0
    share, others = float(kept.double().mean()), len(combined.factors) - 1
    alone = others == len(factors) and not any(bool(t[kept].any()) for t in factors.values())
    if alone and total.value == 1.0:
        name = f"some entries made anew, the others held ({share:.0%})"
        why = "a mask chooses the entries that a map makes anew; the others stay what they are"
    else:
        name = f"skip at some entries only (a = {total.value:.3g} at {share:.0%} of them)"
        why = "the other entries are made anew, without a skip"
    return replace(nothing(steps, name, why, "measured"), residual=total.residual)
