"""The same model at other inputs: what code reads off tensors as plain numbers leaves no trace on the graph.

``h = float(t[1] - t[0])``, ``if x.norm() > 1:``, ``for _ in range(int(n)):`` - what such numbers do to a method shows
only where they are others. So the model is run once more, and a method that is another there is not proven.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.containers import map_tensors

#: Factors of the entries of a tensor, and of single numbers and of increasing ones, which may be times. The first
#: inputs are near, so that of loops that end at a tolerance the rounds are soon seen to be others.
OTHERS = ((1.25, 1.25), (-100.0, 2.0), (0.01, 0.5))
_STIR = 0.5  # of the mean size of the entries, added at random


def numbers_were_read(flow: Flow, stop: int) -> bool:
    """Whether before a state numbers that depend on an input were handed to Python, or given to the model as such."""
    call, recorded = flow.forward_pass, flow.recorded
    if any(isinstance(item, float) for item in (*call.inputs, *call.kwargs.values())):
        return True
    position, clock = flow.states[stop].position, recorded.graph.clock
    last = clock[position] if position < len(clock) else recorded.recording.stop
    return any(read <= last for read in recorded.recording.read)


def at_other_inputs(flow: Flow, factors: tuple[float, float]) -> Flow | None:
    """The flow of the same model at other inputs of the same kind; None where it does not run there.

    Args:
        flow: the flow.
        factors: see `OTHERS`.
    """
    call, other = flow.forward_pass, _Other(*factors)
    args, kwargs = (map_tensors(container, other) for container in (list(call.inputs), dict(call.kwargs)))
    given = tuple(map(other.number, args)), {name: other.number(item) for name, item in kwargs.items()}
    try:
        return flow.again(given=given)
    except StabkitError:  # it refuses other values, or is part of a flow that does not run by itself
        return None


class _Other:
    """Makes tensors of the same kind as those of a call; a tensor that occurs twice stays one."""

    def __init__(self, of_entries: float, of_numbers: float) -> None:
        self._of_entries, self._of_numbers = of_entries, of_numbers
        self._made: dict[int, Tensor] = {}
        self._draws = torch.Generator().manual_seed(round(100 * of_numbers))

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = self._other(tensor.detach())
        return self._made[id(tensor)]

    def number(self, item: Any) -> Any:
        """A number of Python in the place of one."""
        return item * self._of_numbers if isinstance(item, float) else item

    def _other(self, given: Tensor) -> Tensor:
        if given.layout != torch.strided or not given.numel():
            return given
        if given.numel() > 1 and bool(((given == 0) | (given == 1)).all()):
            return self._mask(given)
        if given.is_floating_point() or given.is_complex():
            if given.numel() == 1 or (given.dim() == 1 and bool((given.real.diff() > 0).all())):
                return given * self._of_numbers
            noise = self._drawn(torch.randn, given).to(given.dtype)
            return self._of_entries * (given + _STIR * given.abs().mean() * noise)
        if given.numel() > 1:
            return given.flatten()[torch.randperm(given.numel(), generator=self._draws).to(given.device)].view_as(given)
        return given if given.dtype == torch.bool else torch.where(given > 0, given - 1, given + 1)

    def _mask(self, given: Tensor) -> Tensor:
        """Zeros and ones anew, the first of every row left as it is: what is masked altogether divides by zero."""
        drawn = (self._drawn(torch.rand, given) > 0.5).to(given.dtype)
        drawn[..., :1] = given[..., :1]
        return drawn

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        return draw(like.shape, generator=self._draws).to(like.device)
