"""Steps whose entries change places behind them: x' = P (a x + f(x)), P a permutation.

The layers of a normalizing flow take turns with such a permutation, a reversal or a shuffle of the coordinates, so that
the next one moves others. It has no part in the step: what lies before it is read by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from stabkit.identification.form.chain import Link
from stabkit.identification.form.slots import Slots
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import operation

_NO_STEP = ("not a step", "plain", "transition", "unknown")


def before_moves(found: Slots, links: Sequence[Link], read: Callable[[Slots], Identification]) -> Identification | None:
    """The record of a step of one state behind which entries change places; None where that is not so, or it is none.

    Args:
        found: the states.
        links: from the old one to the new one.
        read: the reading of a step between other states.
    """
    last = links[-1]
    if last.kind != "scaling" or len(links) < 2 or [c.kind for c in last.form.forms[0].values()] != ["moved"]:
        return None
    record = read(replace(found, targets=last.form.sources))
    if record.evidence == "unknown" or record.name in _NO_STEP:
        return None
    moved = ", ".join(operation(node) for node in last.form.piece.nodes)
    why = f"the entries change places behind the step ({moved})"
    return replace(record, name=f"{record.name}, then a permutation", method=None, skip=None, checks=(), recorded=(),
                   notes=(why, *record.notes))  # fmt: skip
