"""One thread at a time: what a pass changes of a model and of torch while it runs is seen by the whole process."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator


class _Turns:
    """A lock that its owner may take again, that any thread may give back, and that a forked child finds free.

    What a generator holds is given back wherever it is thrown away.
    """

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []  # what makes a forked child as if no pass was under way
        self._free = threading.Condition(threading.Lock())
        self._owner: int | None = None
        self._depth = 0

    def take(self) -> None:
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: self._owner in (None, me))
            self._owner = me
            self._depth += 1

    def give(self) -> None:
        with self._free:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._free.notify_all()

    def forked(self) -> None:
        """In a child: the threads that had a turn are not there, so what they changed is put back."""
        if self._owner is not None and self._owner != threading.get_ident():
            for undo in reversed(self.undo):
                undo()
            self._owner, self._depth, self.undo = None, 0, []
        self._free = threading.Condition(threading.Lock())


_turns = _Turns()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns.forked)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Inside, no other thread is inside; one that is may enter again.

    Example:
        >>> with turn(), turn():
        ...     pass
    """
    _turns.take()
    try:
        yield
    finally:
        _turns.give()


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Something that was changed is put back at the end, and in a process that is forked meanwhile.

    Args:
        undo: puts it back; may be called twice.
    """
    _turns.undo.append(undo)
    try:
        yield
    finally:
        if undo in _turns.undo:
            _turns.undo.remove(undo)
        undo()
