"""States and steps of an iterated map, with the interface of those of a traced forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor

from stabkit.operators.jacobian import Jacobian
from stabkit.tracing.maps.linearization import Tensors
from stabkit.tracing.products.step_products import Space
from stabkit.tracing.protocols import FlatState, FlowLike, StateLike


@dataclass(frozen=True, eq=False)
class MapState(FlatState):
    """The state of an iterated map at one time.

    Attributes:
        index: place in ``states``.
        tensors: the state itself.
        space: its flat coordinates.
    """

    index: int
    tensors: Tensors = field(repr=False)
    space: Space = field(repr=False)


@dataclass(frozen=True, eq=False)
class MapStep:
    """One application of an iterated map.

    Attributes:
        index: place in ``steps``.
        iteration: what it is a step of.
    """

    index: int
    iteration: FlowLike = field(repr=False)
    kind: str = "step"
    module_path: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``"step 7"``."""
        return f"step {self.index}"

    @property
    def source(self) -> StateLike:
        """The state before."""
        return self.iteration.states[self.index]

    @property
    def target(self) -> StateLike:
        """The state after."""
        return self.iteration.states[self.index + 1]

    def footprint(self) -> int:
        """0: an iterated map chooses the size of its blocks itself."""
        return 0

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the next state's tensors pulled back to this one's."""
        space = self.iteration.space_at(self.index)
        columns = space.flatten([tensor.unsqueeze(0) for tensor in cotangents])
        return [tensor.squeeze(0) for tensor in space.unflatten(self.jacobian().rmatmat(columns))]

    def jacobian(self) -> Jacobian:
        """The Jacobian of the step, one block per sample, as an operator of shape ``(batch, n, n)``."""
        return self.iteration.jacobian(self.index, self.index + 1)


class Lazy(Sequence[Any]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._length)[index]]
        return self._make(range(self._length)[index])
