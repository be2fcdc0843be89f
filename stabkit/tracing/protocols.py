"""What a traced forward pass and an iterated map have in common: all that measurements ask of a flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stabkit.operators.jacobian import Jacobian
from stabkit.tracing.products.step_products import Space


@dataclass(frozen=True)
class Tangents:
    """The derivative of one step, or of several at once.

    Attributes:
        steps: which steps, in the order of time.
        dense: their Jacobians ``(steps, batch, n, n)`` in the order of time, or None.
        multiply: J V of the one step (J^T U when time runs backwards) for columns ``(batch, n, k)``, or None.
    """

    steps: range
    dense: Tensor | None = None
    multiply: Callable[[Tensor], Tensor] | None = None


class StateLike(Protocol):
    """The state at one depth or time."""

    @property
    def index(self) -> int:
        """Place in ``flow.states``."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The state itself, detached."""

    @property
    def space(self) -> Space:
        """Flat coordinates of the state."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors, batch included."""

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of one sample."""

    @property
    def size(self) -> int:
        """Real coordinates per sample."""

    def flatten(self) -> Tensor:
        """The state as ``(batch, size)``."""


class FlatState:
    """What follows from the flat coordinates and the tensors of a state."""

    @property
    def shapes(self: StateLike) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors, batch included."""
        return tuple(meta.shape for meta in self.space.metas)

    @property
    def sample_shapes(self: StateLike) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of one sample."""
        return self.space.sample_shapes

    @property
    def size(self: StateLike) -> int:
        """Real coordinates per sample."""
        return self.space.size

    def flatten(self: StateLike) -> Tensor:
        """The state as ``(batch, size)``."""
        return self.space.flatten([tensor.unsqueeze(0) for tensor in self.tensors]).squeeze(-1)


def same_space(before: StateLike, after: StateLike) -> bool:
    """Whether two states lie in one space: of the same shapes, real or complex alike."""
    return before.space.axes == after.space.axes


class StepLike(Protocol):
    """The map from one state to the next."""

    @property
    def index(self) -> int:
        """Place in ``flow.steps``."""

    @property
    def name(self) -> str:
        """What a person would call the step; unique in the flow."""

    @property
    def module_path(self) -> str:
        """Path of the module that does most of the step's work, ``""`` when no module does."""

    @property
    def kind(self) -> str:
        """``"step"`` (same space before and after) or ``"transition"``."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the derivative is not, or may not be, that of what the step computes."""

    @property
    def source(self) -> StateLike:
        """The state before."""

    @property
    def target(self) -> StateLike:
        """The state after."""

    def footprint(self) -> int:
        """Bytes alive at once, at most, for every cotangent that is pulled back; 0 where that is seen to already."""

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the target's tensors pulled back to the source's."""

    def jacobian(self) -> Jacobian:
        """The Jacobian of the step, one block per sample."""


class FlowLike(Protocol):
    """A chain of states and steps: a traced `Flow` over depth, or an `Iteration` over time."""

    @property
    def states(self) -> Sequence[StateLike]:
        """The states, one more than there are steps."""

    @property
    def steps(self) -> Sequence[StepLike]:
        """``steps[i]`` leads from ``states[i]`` to ``states[i + 1]``."""

    @property
    def batch(self) -> int:
        """Number of samples; 1 when the whole batch is one state."""

    @property
    def model(self) -> nn.Module:
        """The module whose forward pass, or whose repeated application, the flow is."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know about how the flow was found."""

    @property
    def over_time(self) -> bool:
        """Whether one map is applied again and again, rather than one layer after the other."""

    @property
    def step_size(self) -> float | None:
        """How much time a step takes; None when a step is a step."""

    @property
    def lengths(self) -> Tensor | None:
        """``(batch,)`` how many steps each sample takes; None when all take all."""

    @property
    def sizes(self) -> list[int]:
        """Real coordinates per sample of the states; one number where they are all alike."""

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype in which products are made."""

    def __len__(self) -> int:
        """How many steps there are."""

    def space_at(self, index: int) -> Space:
        """Flat coordinates of a state, without the state; negative indices count from the last."""

    def flat_states(self) -> Iterator[Tensor]:
        """All states in order, ``(batch, size)`` each."""

    def tangents(self, k: int, *, adjoint: bool = False) -> Iterator[Tangents]:
        """The derivatives of all steps, in the order in which k vectors pass them; backwards with ``adjoint``."""

    def jacobian(self, start: int = 0, stop: int | None = None) -> Jacobian:
        """The Jacobian of the map from ``states[start]`` to ``states[stop]`` (default: the last)."""

    def cotangent(self, loss: Any = None, *, seed: int = 0) -> list[Tensor]:
        """Cotangent of the last state: the gradient of a loss, or standard normal numbers."""
