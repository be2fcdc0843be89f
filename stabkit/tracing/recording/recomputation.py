"""Saved tensors that are forgotten and computed again, one step at a time, so that depth costs no memory.

Autograd keeps, for every node, the tensors that its backward needs. Here only their number in the order of saving is
kept. When a step is differentiated, the forward pass runs again up to the end of that step and holds on to the tensors
of that step alone: memory is that of the largest step and the states, time that of one forward pass more per step.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing.recording.changed_weights import weights_changed


class _Enough(BaseException):
    """The forward pass has come far enough; not an ``Exception``, so that a model's own handlers let it pass."""


class SavedTensors:
    """The numbered tensors that a forward pass saves for its backward pass.

    Args:
        module: its parameters and buffers stay where they are and are never copied.
        run: runs the same forward pass again, under the hooks that it is given.
        clock: shows the number of the node that is being made.
    """

    def __init__(self, module: nn.Module, run: Callable[[SavedTensors], Any], clock: Callable[[], int]) -> None:
        self._run = run
        self._clock = clock
        self._storages = {
            tensor.untyped_storage()._cdata
            for tensor in (*module.parameters(), *module.buffers())
            if tensor.layout == torch.strided
        }
        self._parameters = list(module.parameters())
        self._versions = self._parameter_versions()
        self._clocks: list[int] = []
        self._bounds: list[int] = []
        self._held: dict[int, Tensor] = {}
        self._range = (0, 0)
        self._count = 0
        self._again = False
        self.most_bytes = 0

    def begin_anew(self) -> None:
        """The pass is recorded once more."""
        self._clocks.clear()

    def divide(self, clocks: Sequence[int]) -> None:
        """Say where steps begin and end, as clocks of the first run."""
        self._bounds = sorted({0, *(bisect.bisect_left(self._clocks, time) for time in clocks), len(self._clocks)})

    def divide_evenly(self, parts: int) -> None:
        """Say so before steps are known: for what is asked of a few nodes, one part is held at a time."""
        self.divide(self._clocks[:: max(1, len(self._clocks) // parts)])

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which the forward pass must run."""
        self._count = 0
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def prefetch(self, start: int, stop: int) -> None:
        """Hold what was saved between two clocks of the first run, and nothing else."""
        self._refuse_changed_weights()
        low, high = (bisect.bisect_left(self._clocks, time) for time in (start, stop))
        if self._range[0] <= low and high <= self._range[1]:
            return
        self._compute(low, high)

    def _pack(self, tensor: Tensor) -> Tensor | int:
        number, self._count = self._count, self._count + 1
        if not self._again:
            self._clocks.append(self._clock() - 1)  # the node that saves has its number already
        if tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages:
            return tensor
        if self._again:
            low, high = self._range
            if number >= high:
                raise _Enough
            if low <= number:
                self._held[number] = tensor.detach()
        return number

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self._held:
            place = bisect.bisect_right(self._bounds, packed)
            self._compute(self._bounds[place - 1], self._bounds[place])
        if packed not in self._held:
            raise TraceError("the forward pass took another course when it was run again; use memory='keep'")
        return self._held[packed]

    def _compute(self, low: int, high: int) -> None:
        self._refuse_changed_weights()
        self._held.clear()
        self._range = (low, high)
        if low == high:
            return
        self._again = True
        try:
            self._run(self)
        except _Enough:
            pass
        finally:
            self._again = False
        self.most_bytes = max(self.most_bytes, _bytes(self._held.values()))

    def _refuse_changed_weights(self) -> None:
        if self._versions != self._parameter_versions():
            raise weights_changed()

    def _parameter_versions(self) -> list[int]:
        return [0 if p.is_inference() else p._version for p in self._parameters]


def _bytes(tensors: Any) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided}
    return sum(sizes.values())
