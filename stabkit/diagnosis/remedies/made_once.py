"""What several rules of one diagnosis ask for, made once: trainings above all, that of the untreated model first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

from stabkit.tracing.recording.forward_pass import ForwardPass

T = TypeVar("T")

#: by what was asked for, what was made; with the objects that it was made of, so that no other gets their ids
_MADE: ContextVar[dict[Hashable, tuple[Any, tuple[Any, ...]]] | None] = ContextVar("made", default=None)


@contextlib.contextmanager
def made_once() -> Iterator[None]:
    """Within it, `once` remembers; the outermost one forgets at its end."""
    if _MADE.get() is not None:
        yield
        return
    token = _MADE.set({})
    try:
        yield
    finally:
        _MADE.reset(token)


def once(make: Callable[[], T], call: ForwardPass, held: tuple[Any, ...] = (), words: Hashable = ()) -> T:
    """What ``make`` makes, and the same object at each further call of a diagnosis.

    Args:
        make: makes it.
        call: the pass that it is made of: the same model, inputs, weights and seed give the same.
        held: what else it is made of, told apart by identity: a loss, a context.
        words: and by value: numbers, names.
    """
    made = _MADE.get()
    if made is None:
        return make()
    parts = _parts(call)
    key = (tuple(map(_mark, parts)), call.seed, tuple(map(id, held)), words)
    if key not in made:
        made[key] = (make(), (*parts, *held))
    found: T = made[key][0]
    return found


def _parts(call: ForwardPass) -> tuple[Any, ...]:
    """The objects that decide what a pass computes, but for the options of modules, which stay as they are."""
    given = [*call.inputs, *call.kwargs, *call.kwargs.values()]
    tensors = [tensor for _, tensor in call.given]
    return (call.model, *call.module.modules(), *call.module.parameters(), *given, *tensors)


def _mark(part: Any) -> Hashable:
    """Identity, and of a tensor how often it was written."""
    written = part._version if isinstance(part, Tensor) and not part.is_inference() else 0
    return id(part), written
