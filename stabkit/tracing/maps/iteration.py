"""A flow from any map: states are computed when they are asked for, so that length costs no memory."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.errors import OutOfRangeError, TraceError
from stabkit.operators.jacobian import Jacobian
from stabkit.text import shows_printable
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.maps.first_step import check_sizes, tensors_of, try_first_step
from stabkit.tracing.maps.linearization import RecordedStep, StepFunction, Tensors, jacobians
from stabkit.tracing.maps.map_states import Lazy, MapState, MapStep
from stabkit.tracing.products.step_products import Space
from stabkit.tracing.protocols import Tangents
from stabkit.tracing.recording.randomness import seeded
from stabkit.tracing.recording.untouched_model import Safe, aside
from stabkit.tracing.recording.wrappers import modules_behind

_NUMBERS = 2**22  # how many numbers a window of time may hold at once
_LONGEST = 2048  # steps of a window
_SMALL = 64  # up to here all of a Jacobian is cheaper than single products


@dataclass(frozen=True, eq=False)
class Iteration:
    """A map applied again and again, read as a flow over time.

    It has the interface of a `Flow` (``states``, ``steps``, ``jacobian``, ``batch``), but holds no trajectory: what is
    asked for is computed anew from the nearest state that was kept. What measures growth streams through it.

    Attributes:
        initial: tensors of the first state.
        n_steps: how often the map is applied.
        inputs: what drives the steps, each tensor ``(n_steps, batch, ...)``.
        step_size: how much time a step takes, None when a step is a step.
        lengths: ``(batch,)`` how many steps each sample takes before it is held where it is; None when all take all.
        name: the name of the map.
        notes: what the reader should know.
    """

    initial: Tensors = field(repr=False)
    n_steps: int
    inputs: Tensors = field(repr=False)
    step_size: float | None
    lengths: Tensor | None
    name: str
    function: StepFunction = field(repr=False)
    model: nn.Module = field(repr=False)
    notes: tuple[str, ...] = ()
    _as_given: Callable[[Tensors], Any] = field(default=lambda state: state, repr=False)
    _kept: dict[int, Tensors] = field(default_factory=dict, repr=False)
    _writes: bool = True  # to tensors for which no copies stand

    def again(self) -> Iteration:
        """The same map from the same state, at the weights that its module has now."""
        return replace(self, _kept={})

    def __len__(self) -> int:
        return self.n_steps

    @shows_printable
    def __repr__(self) -> str:
        return f"Iteration of {self.name}: {self.n_steps} steps of {self.space.size} numbers, batch {self.batch}"

    @property
    def space(self) -> Space:
        """Flat coordinates, the same for every state."""
        return self.function.space(self.initial)

    @property
    def over_time(self) -> bool:
        """True: one map is applied again and again."""
        return True

    @property
    def sizes(self) -> list[int]:
        """Real coordinates per sample, one number for all states."""
        return [self.space.size]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which products are made."""
        return self.space.dtype

    def space_at(self, index: int) -> Space:
        """Flat coordinates, the same for every state."""
        return self.space

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.space.batch

    @property
    def states(self) -> Sequence[MapState]:
        """The ``n_steps + 1`` states, each computed when it is asked for."""
        return Lazy(self.n_steps + 1, lambda index: MapState(index, self._state(index), self.space))

    @property
    def steps(self) -> Sequence[MapStep]:
        """The steps."""
        return Lazy(self.n_steps, lambda index: MapStep(index, self))

    @property
    def output(self) -> Any:
        """The last state, in the form in which ``x0`` was given."""
        return self._as_given(self._state(self.n_steps))

    def trajectory(self, every: int = 1) -> Tensor:
        """Every so many states in flat coordinates, ``(saved, batch, n)``, beginning with the first."""
        return torch.stack(list(itertools.islice(self.flat_states(), None, None, every)))

    def flat_states(self) -> Iterator[Tensor]:
        """All states in order, ``(batch, size)`` each; they are computed on the way."""
        space = self.space
        for start, _, states in self._windows(self._window(1)):
            for state in states[:-1] if start + len(states) - 1 < self.n_steps else states:
                yield space.flatten([tensor.unsqueeze(0) for tensor in state]).squeeze(-1)

    def jacobian(self, start: int = 0, stop: int | None = None) -> Jacobian:
        """The Jacobian of the map from ``states[start]`` to ``states[stop]`` (default: the last), as an operator.

        Raises:
            OutOfRangeError: the two do not name states in this order.
        """
        stop = self.n_steps if stop is None else stop
        if not 0 <= start < stop <= self.n_steps:
            raise OutOfRangeError(f"start={start}, stop={stop}; expected 0 <= start < stop <= {self.n_steps}")
        space = self.space
        with self._aside():
            states = self._run(self._state(start), start, stop)
            steps = [self._recorded(states[i : i + 2], start + i, 1) for i in range(stop - start)]

        def forward(columns: Tensor) -> Tensor:
            with self._aside():  # hooks of its own may run on the way back
                steps[0].certify(space.batch)
                for step in steps:
                    columns = step.push(columns)
            return columns

        def backward(columns: Tensor) -> Tensor:
            with self._aside():
                for step in reversed(steps):
                    columns = step.pull(columns)
            return columns

        shape = (space.batch, space.size, space.size)
        return Jacobian(shape, forward, backward, dtype=space.dtype, device=space.device, path="iterated map")

    def cotangent(self, loss: Any = None, *, seed: int = 0) -> list[Tensor]:
        """Cotangent of the last state: the gradient of a loss of it, or standard normal numbers.

        Raises:
            TraceError: the loss is not a differentiable scalar.
        """
        last = self._state(self.n_steps)
        if loss is None:
            generator = torch.Generator().manual_seed(seed)
            return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in last]
        leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in last)
        scalar = scalar_loss(loss, self._as_given(leaves))
        grads = torch.autograd.grad(scalar, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]

    def tangents(self, k: int, *, adjoint: bool = False) -> Iterator[Tangents]:
        """The derivatives of all steps in the order in which a frame of k vectors passes them.

        Small states come with whole Jacobians, many steps at once; of large ones each step is recorded on k copies.

        Args:
            k: how many vectors will be multiplied.
            adjoint: from the last step to the first, with transposed products.
        """
        size, batch = self.space.size, self.batch
        dense = size <= _SMALL or (2 * k >= size and size * size * batch <= _NUMBERS)
        at_once = self._window(size) if dense else 1
        with self._aside():
            certified = adjoint
            for first, last, states in self._windows(self._window(size if dense else 1), adjoint):
                starts = range(first, last, at_once)
                for start in reversed(starts) if adjoint else starts:
                    stop = min(start + at_once, last)
                    part = states[start - first : stop - first + 1]
                    if dense:
                        drive = tuple(given[start:stop] for given in self.inputs)
                        yield Tangents(range(start, stop), dense=jacobians(self.function, part, drive))
                        continue
                    step = self._recorded(part, start, k)
                    if not certified:
                        step.certify(batch)
                        certified = True
                    yield Tangents(range(start, stop), multiply=step.pull if adjoint else step.push)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Safe]:
        """Inside, the map may be run; what it changes of its own comes back."""
        with aside(self.model, self.function.call, given=self.inputs, watch=self._writes) as safe:
            safe.freeze()
            seeded(0)
            yield safe

    def _recorded(self, pair: Sequence[Tensors], index: int, copies: int) -> RecordedStep:
        drive = tuple(part[index] for part in self.inputs)
        return RecordedStep(self.function, pair[0], drive, pair[1], copies)

    def _window(self, width: int) -> int:
        numbers = self.space.size * self.batch * width
        return max(1, min(_LONGEST, self.n_steps, _NUMBERS // max(numbers, 1)))

    def _windows(self, length: int, reverse: bool = False) -> Iterator[tuple[int, int, list[Tensors]]]:
        """Stretches of the trajectory, in order or from the last to the first: start, stop, their states."""
        length = max(length, math.isqrt(self.n_steps))  # as many kept states as states in a window, at most
        starts = range(0, self.n_steps, length)
        for start in reversed(starts) if reverse else starts:
            stop = min(start + length, self.n_steps)
            states = self._run(self._state(start, length), start, stop)
            self._kept[stop] = states[-1]
            yield start, stop, states

    def _state(self, index: int, spacing: int | None = None) -> Tensors:
        if index == 0:
            return self.initial
        near = max((known for known in self._kept if known <= index), default=0)
        state = self._kept.get(near, self.initial)
        spacing = spacing or max(1, math.isqrt(self.n_steps))
        while near < index:
            stop = min(index, near + spacing)
            state = self._run(state, near, stop, keep=False)[-1]
            near = stop
            self._kept[near] = state
        return state

    def _run(self, state: Tensors, start: int, stop: int, keep: bool = True) -> list[Tensors]:
        """The states from ``start`` to ``stop``.

        Raises:
            TraceError: a state is not finite.
        """
        states, first = [state], state
        with self._aside(), torch.no_grad(), torch.inference_mode(False):
            for index in range(start, stop):
                state = self.function.call(state, tuple(part[index] for part in self.inputs))
                if keep:
                    states.append(state)
        if not all(bool(tensor.isfinite().all()) for tensor in state):
            raise TraceError(self._divergence(first, start, stop))
        return states if keep else [state]

    def _divergence(self, state: Tensors, start: int, stop: int) -> str:
        with torch.no_grad():
            for index in range(start, stop):
                state = self.function.call(state, tuple(part[index] for part in self.inputs))
                bad = ~self.space.flatten([tensor.unsqueeze(0) for tensor in state]).isfinite().all(1)
                if bool(bad.any()):
                    return (
                        f"the state of sample {int(bad.flatten().nonzero()[0])} is not finite after step {index}: the "
                        "trajectory leaves every bound; start it closer to the attractor or take fewer steps"
                    )
        return f"a state between steps {start} and {stop} was not finite, and was finite when computed again"


@accepts
def iterate(
    step_fn: Callable[..., Any],
    x0: Any,
    n_steps: int,
    *,
    inputs: Any = None,
    batch_dim: int | None = 0,
    step_size: float | None = None,
) -> Iteration:
    """The flow of a map ``x -> step_fn(x)`` from its initial states: any torch function or module, any length.

    No trajectory is held: growth is measured while it is computed, and single states are computed anew when they are
    asked for. The map must give the same result when it is called twice at the same state.

    Args:
        step_fn: a differentiable function from a state to the next one of the same shape; with ``inputs``, of a state
            and an input. A module applied to its own output is depth with tied weights.
        x0: the initial states, a tensor ``(batch, ...)`` or a tuple of such tensors; floating point.
        n_steps: how often the map is applied.
        inputs: what drives the map, a tensor ``(n_steps, batch, ...)`` or a tuple of such tensors.
        batch_dim: 0, or None when the samples influence each other: then the whole of ``x0`` is one state.
        step_size: how much time a step takes; growth is then also given per unit of time.

    Raises:
        TraceError: the arguments do not fit, ``step_fn`` changes the shape of the state or its argument, or the
            samples of the batch influence each other.

    Example:
        >>> import torch
        >>> flow = iterate(lambda x: 4 * x * (1 - x), torch.tensor([[0.3], [0.4]], dtype=torch.float64), 3)
        >>> [round(float(x), 6) for x in flow.states[1].flatten()]
        [0.84, 0.96]
        >>> [round(float(d), 6) for d in flow.jacobian(0, 1).dense().flatten()]
        [1.6, 0.8]
    """
    if not callable(step_fn):
        raise TraceError(f"step_fn is a {type(step_fn).__name__}; expected a function of a state to the next")
    if batch_dim not in (0, None):
        raise TraceError(f"batch_dim={batch_dim!r}; expected 0 (x0 is (batch, ...)) or None (x0 is one state)")
    single = isinstance(x0, Tensor)
    initial = tensors_of(x0, "x0")
    driven = () if inputs is None else tensors_of(inputs, "inputs")
    check_sizes(initial, driven, n_steps, batch_dim)
    alone = isinstance(inputs, Tensor)

    def call(state: Tensors, drive: Tensors) -> Tensors:
        given: list[Any] = [state[0] if single else state]
        if driven:
            given.append(drive[0] if alone else drive)
        after = step_fn(*given)
        return (after,) if isinstance(after, Tensor) else tensors_of(after, "what step_fn returned")

    if batch_dim is None and driven:
        plain = call
        call = lambda state, drive: plain(state, tuple(part.squeeze(0) for part in drive))  # noqa: E731
        driven = tuple(part.unsqueeze(1) for part in driven)
    function = StepFunction(call, tuple(batch_dim for _ in initial))
    name = getattr(step_fn, "__name__", type(step_fn).__name__)
    flow = iteration(function, initial, n_steps, driven, modules_behind(step_fn), name=name, step_size=step_size)
    return replace(flow, _as_given=lambda state: state[0]) if single else flow


def iteration(
    function: StepFunction,
    initial: Tensors,
    n_steps: int,
    inputs: Tensors,
    model: nn.Module,
    *,
    name: str,
    step_size: float | None = None,
    lengths: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> Iteration:
    """An `Iteration` whose first step was tried: shapes are kept, arguments are not written, samples are independent.

    Raises:
        TraceError: one of these does not hold.
    """
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise TraceError(f"step_size={step_size!r}; expected a positive number, or None")
    initial = tuple(tensor.detach().clone() for tensor in initial)
    flow = Iteration(initial, n_steps, inputs, step_size, lengths, name, function, model, notes)
    with flow._aside() as safe:
        try_first_step(function, initial, tuple(part[0] for part in inputs))
    return replace(flow, _writes=safe.wrote)
