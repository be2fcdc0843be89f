"""Pictures of a training run while it goes on: every block over the training steps, one picture a quantity."""

from __future__ import annotations

from typing import Any

import numpy as np

from stabkit.monitor.record import Record

QUANTITIES = ("growth", "gradient_norm", "activation_norm", "update_ratio", "attention_logit", "attention_entropy")
_FIRST = 8  # records before the first picture
_KEPT = 256  # columns of a picture: more cannot be told apart


class Charts:
    """Keeps records of the whole run, evenly thinned, and draws them.

    Pictures take some tenths of a second, so they are due whenever there are twice as many records as at the last
    ones, which makes their share of a long run as small as one likes.

    Attributes:
        step: the training step of the newest record; -1 before the first.

    Example:
        >>> Charts().due
        False
    """

    def __init__(self) -> None:
        self.step = -1
        self._records: list[Record] = []
        self._seen, self._stride = 0, 1
        self._next = _FIRST
        self._undrawn = False

    @property
    def due(self) -> bool:
        """Whether there are twice as many records as when the last pictures were drawn."""
        return self._seen >= self._next

    def add(self, record: Record) -> None:
        """Take a record."""
        if self._seen % self._stride == 0:
            self._records.append(record)
        self._seen += 1
        self.step, self._undrawn = record.step, True
        if len(self._records) > _KEPT:
            del self._records[1::2]
            self._stride *= 2

    def drawn(self) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
        """Pictures ``(height, width, 4)`` of the run so far by quantity; none where nothing is new.

        A quantity that was not measured (updates without an optimizer) has no picture.
        """
        if not self._undrawn or not any(len(record.blocks) for record in self._records):
            return {}
        self._undrawn = False
        self._next = 2 * max(self._seen, _FIRST)
        return {quantity: _picture(self._records, quantity) for quantity in QUANTITIES if _has(self._records, quantity)}


def _has(records: list[Record], quantity: str) -> bool:
    return any(np.isfinite(record.blocks.columns()[quantity]).any() for record in records)  # updates not in each


def _picture(records: list[Record], quantity: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stabkit import plotting

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    plotting.training(records, figure.add_subplot(), quantity=quantity)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()
