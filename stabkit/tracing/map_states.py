"""States and steps of an iterated map, with the interface of those of a traced forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from stabkit.operators.jacobian import Jacobian
from stabkit.tracing.linearization import Tensors
from stabkit.tracing.products import Space

if TYPE_CHECKING:
    from stabkit.tracing.iteration import Iteration


@dataclass(frozen=True, eq=False)
class MapState:
    """The state of an iterated map at one time.

    Attributes:
        index: place in ``states``.
        tensors: the state itself.
        space: its flat coordinates.
    """

    index: int
    tensors: Tensors = field(repr=False)
    space: Space = field(repr=False)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors, batch included."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of one sample."""
        return self.space.sample_shapes

    @property
    def size(self) -> int:
        """Real coordinates per sample."""
        return self.space.size

    def flatten(self) -> Tensor:
        """The state as ``(batch, size)``."""
        return self.space.flatten([tensor.unsqueeze(0) for tensor in self.tensors]).squeeze(-1)


@dataclass(frozen=True, eq=False)
class MapStep:
    """One application of an iterated map.

    Attributes:
        index: place in ``steps``.
        iteration: what it is a step of.
    """

    index: int
    iteration: Iteration = field(repr=False)
    kind: str = "step"
    module_path: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``"step 7"``."""
        return f"step {self.index}"

    @property
    def source(self) -> MapState:
        """The state before."""
        return self.iteration.states[self.index]

    @property
    def target(self) -> MapState:
        """The state after."""
        return self.iteration.states[self.index + 1]

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the next state's tensors pulled back to this one's."""
        space = self.iteration.space
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
