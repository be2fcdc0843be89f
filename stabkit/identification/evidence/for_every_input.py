"""What is proven holds for every input: readings whose numbers, or whose operations, the input of this pass decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stabkit.identification.form.fed import fed_numbers, ways
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.other_inputs import numbers_were_read
from stabkit.identification.form.slots import Slots
from stabkit.identification.form.unseen import routed, unseen
from stabkit.identification.names.step_size import NUMBER
from stabkit.identification.record import Identification
from stabkit.integrators import GeneralLinearMethod

_SAME = 1e-4  # relative; numbers of a tableau in single precision


def holding(
    around: Surroundings, record: Identification, found: Slots, read: Callable[[Surroundings], Identification]
) -> Identification:
    """A record that is called proven only if it holds for every input; one that does not is measured, with the reason.

    Args:
        around: the index of the flow.
        record: the reading.
        found: the states of the method.
        read: reads the same steps of the same model at other inputs.
    """
    start, stop = record.steps[0], record.steps[-1] + 1
    is_plain = record.name == "plain"
    found_ways = ways(around, start, stop, found, of_stages=bool(record.shared_weights), skip_alone=is_plain)
    paths = set().union(*(path for _, path in found_ways))
    chosen, cut = routed(around, start, stop, found), unseen(around, start, stop, paths)
    fed = fed_numbers(around, found_ways, skip_alone=is_plain)
    if chosen:
        why = f"data choose which entries take part ({', '.join(chosen)}): the branches are those of this input"
    elif cut:
        why = f"{', '.join(cut)} cuts the gradient beside the state: this is the step of gradients, not of values"
        if "no branch" in record.name:
            record = replace(record, name=record.name.replace("no branch", "no branch that gradients see"))
        if record.convention == NUMBER:
            record = replace(record, convention=f"{NUMBER} here, and may be made of the data off the graph")
    elif fed:
        why = f"an input of the model makes numbers of the step ({', '.join(fed)}): they are those of this input"
    else:
        why = _differs_elsewhere(around, record, stop, read)
    return replace(record, evidence="measured", notes=(why, *record.notes)) if why else record


def _differs_elsewhere(
    around: Surroundings, record: Identification, stop: int, read: Callable[[Surroundings], Identification]
) -> str:
    """Why numbers that Python read off the inputs may be those of a method; empty where they are not."""
    if not numbers_were_read(around.flow, stop):
        return ""
    said = "numbers that depend on an input were handed to Python, and at other inputs"
    runs = False
    for other in around.elsewhere():
        runs = True
        if len(other.flow.steps) != len(around.flow.steps):
            return f"{said} there are more or fewer steps"
        if not is_same_method(record, read(other)):
            return f"{said} this is another method"
    return "" if runs else f"{said} the model does not run"


def is_same_method(record: Identification, other: Identification) -> bool:
    """Whether two readings claim the same method, with the same numbers."""
    if _bare(record.name) != _bare(other.name) or record.after != other.after:
        return False
    numbers = [(record.skip, other.skip), (record.step_size, other.step_size)]
    if any((a is None) != (b is None) for a, b in numbers):
        return False
    if not all(a is None or b is None or np.isclose(a, b, rtol=_SAME, atol=_SAME) for a, b in numbers):
        return False
    a, b = record.method, other.method
    if not isinstance(a, GeneralLinearMethod) or not isinstance(b, GeneralLinearMethod):
        return type(a) is type(b)
    pairs = [(np.asarray(getattr(a, n)), np.asarray(getattr(b, n))) for n in ("A", "U", "B", "V")]
    return all(x.shape == y.shape and np.allclose(x, y, rtol=_SAME, atol=_SAME) for x, y in pairs)


def _bare(name: str) -> str:
    return name.partition(" (")[0]
