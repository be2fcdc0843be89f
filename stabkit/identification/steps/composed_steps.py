"""Steps after each other that make one composition: leapfrogs of several sizes, one of them backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.compositions import Shear, is_composition, may_be_known, merged, shears
from stabkit.identification.record import Identification
from stabkit.integrators import GeneralLinearMethod

_LONGEST = 8  # steps in a composition; Yoshida's of order 6 takes seven leapfrogs
_SECOND_ORDER = "x'' = f(x)"  # systems whose force is multiplied by h^2

Reader = Callable[[int, int], Identification]


def with_compositions(records: Sequence[Identification], read: Reader) -> list[Identification]:
    """Records, those of steps that make one composition taken together.

    Args:
        records: the readings of consecutive steps.
        read: the reading of some steps, by their first and one past their last.
    """
    known = [_shears(record) for record in records]
    found: list[Identification] = []
    i = 0
    while i < len(records):
        whole = _composition(records, known, i, read)
        found.append(records[i] if whole is None else whole)
        i += 1 if whole is None else sum(record.steps[0] in whole.steps for record in records)
    return found


def _composition(
    records: Sequence[Identification], known: Sequence[tuple[Shear, ...]], first: int, read: Reader
) -> Identification | None:
    """The record of a composition that begins with one of some records; None where none does."""
    sequence: list[Shear] = []
    for last in range(first, min(first + _LONGEST, len(records))):
        if not known[last]:
            return None
        sequence += known[last]
        if last > first and may_be_known(merged(sequence, 0.0)):
            whole = read(records[first].steps[0], records[last].steps[-1] + 1)
            if is_composition(whole.name):  # so that all of it evaluates one field
                return whole
    return None


def _shears(record: Identification) -> tuple[Shear, ...]:
    """The kicks and drifts of a step that has a method of two states; empty for others."""
    method, h = record.method, record.step_size
    if not isinstance(method, GeneralLinearMethod) or method.states != 2 or not h or record.evidence != "proven":
        return ()
    unit = h * h if record.system == _SECOND_ORDER else h
    A, B = np.asarray(method.A) * unit, np.asarray(method.B) * unit
    table = Blocks(A, np.asarray(method.U), B, np.asarray(method.V), tuple(method.fields), ())
    return shears(table) or ()
