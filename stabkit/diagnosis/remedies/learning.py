"""Whether a model learns from its input at the usual rates: a few steps of Adam beside the best constant output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.best_constant import left_by_a_constant
from stabkit.diagnosis.remedies.usual_training import adams, left_after
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass


def left_beside_a_constant(call: ForwardPass, loss: Any, actions: Sequence[Action] = ()) -> float | None:
    """What a few steps of Adam leave of a loss, over what the best constant output leaves of it; None where unknown.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        actions: a remedy that is carried out before.
    """
    done = training_pass(call, loss, differentiate=False)
    floor = left_by_a_constant(loss, done.output) if done.loss is not None else None
    if floor is None or done.loss is None or not floor > 0:
        return None
    first, left = done.loss, left_after(call, loss, adams(floor), actions)
    if actions and left is not None:
        with carried_out(call.module, actions):
            treated = training_pass(call, loss, differentiate=False).loss
        first = first if treated is None else treated
    return None if left is None else left * float(first.detach()) / floor
