"""Euler steps of a field that has a linear part, another one at every step: x' = x + h (g(x, t) - c(t) x).

Samplers of diffusion models take them: d = (x - D(x, t)) / t, x' = x + h d. Of one such step only x' = a x + b g(x) can
be seen, and c h = 1 - a is as well a damping. That c is another number from step to step, while the code adds h times
the same sum to the state, is what tells the field, as it does between the stages of one step (see ``field_values``). A
step beside those of such a field, the last one of Heun's sampler, is one of that field as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from stabkit.identification.evidence.for_every_input import holding
from stabkit.identification.fields.field_values import CONTINUED, chains_of_one_field
from stabkit.identification.form.chain import Link
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.slots import Slots
from stabkit.identification.names.single import CLOSE
from stabkit.identification.record import Identification, nothing

_TOLD = "the value of the field ends after its linear part, which is another one at every step"
_SUBTRACTED = "the branch is subtracted"
_OF_THE_REST = ("damped Euler (a =", "scaled skip (a =", "plain")


def with_fields_in_time(
    records: Sequence[Identification], read: Callable[[int, int], Identification | None]
) -> list[Identification]:
    """Records, damped steps of one field in a run named as Euler steps where its linear part varies.

    Args:
        records: in order.
        read: of a step its reading as an Euler step of a field with a linear part; None where it is none.
    """
    others = [_as_euler(record, read) for record in records]
    found: list[Identification] = []
    places = range(len(records))
    for is_run, run in itertools.groupby(places, lambda i: others[i] is not None or CONTINUED in records[i].notes):
        inside = list(run)
        pairs = [(records[i], others[i]) for i in inside]
        rates = [_rate(record, other) for record, other in pairs if other is not None]
        told = is_run and (len(rates) < len(pairs) or max(rates) - min(rates) > CLOSE * max(map(abs, rates)))
        found += [_told(record, other) if told and other is not None else record for record, other in pairs]
    return found


def read_as_euler(
    around: Surroundings,
    start: int,
    stop: int,
    read: Callable[[Surroundings, Slots, Sequence[Link], tuple[int, ...]], Identification],
) -> Identification | None:
    """An Euler step of a field with a linear part of its own, which the code multiplies by h; None where it is none.

    Args:
        around: the flow.
        start: the step's state.
        stop: the state behind it.
        read: the reading of the links of additions.
    """
    steps = tuple(range(start, stop))

    def reading(around: Surroundings, found: Slots) -> Identification | None:
        if len(found.sources) != 1 or len(found.targets) != 1:
            return None
        for links in chains_of_one_field(around, found, around.chain(start, stop, found), steps):
            record = read(around, found, links, steps)
            if record.name.startswith("forward Euler") and record.skip == 1.0 and record.step_size != 1.0:
                return record
        return None

    found = around.slots(start, stop)
    record = reading(around, found)
    if record is None or record.evidence != "proven":
        return record
    none = nothing(steps, "unknown", "no such step at another input", "unknown")
    return holding(around, record, found, lambda other: reading(other, other.slots(start, stop)) or none)


def _as_euler(record: Identification, read: Callable[[int, int], Identification | None]) -> Identification | None:
    one = len(record.steps) == 1 and len(record.recorded) == 1 and record.skip is not None and not record.after
    if not one or not record.name.startswith(_OF_THE_REST):
        return None
    return read(record.steps[0], record.steps[0] + 1)


def _rate(record: Identification, other: Identification) -> float:
    """The rate c of the linear part, from a = 1 - c h."""
    return (1.0 - (record.skip or 0.0)) / (other.step_size or 1.0)


def _told(record: Identification, other: Identification) -> Identification:
    """The Euler step: its field is the one that the code adds, so that h has the sign which that gives it."""
    a, b = record.skip or 0.0, record.step_size or 0.0
    signs = [-1 if any(_SUBTRACTED in note for note in r.notes) else 1 for r in (record, other)]
    alone = f"x' = {a:.4g} x {'-' if signs[0] < 0 else '+'} {b:.4g} g(x), with what bends in the field alone as g"
    notes = [note for note in (*other.notes, *record.notes) if _SUBTRACTED not in note]
    h = None if other.step_size is None else signs[1] * other.step_size
    return replace(other, step_size=h, over_time=record.over_time, notes=tuple(dict.fromkeys((_TOLD, alone, *notes))))
