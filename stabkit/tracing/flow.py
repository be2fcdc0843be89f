"""A forward pass as a chain: states, the steps between them, and their Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from stabkit.errors import OutOfRangeError, TraceError
from stabkit.operators.jacobian import Jacobian
from stabkit.text import shows_printable
from stabkit.tracing.cutting.endpoints import Target, outputs_read, scalar_loss
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors
from stabkit.tracing.products.recorded_jacobian import jacobian_of
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.products.step_products import Products, Space
from stabkit.tracing.protocols import FlatState, Tangents
from stabkit.tracing.recording.changed_weights import refusing_changed_weights
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.recorded_pass import RecordedPass

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class State(FlatState):
    """Everything that the rest of the model depends on, at one depth.

    Attributes:
        index: place in ``flow.states``.
        position: how many operations lie before it.
        values: the live values on the graph.
        layouts: which entries of each belong to which sample.
    """

    index: int
    position: int
    values: tuple[Value, ...]
    layouts: tuple[Layout, ...]
    _data: dict[Value, Tensor] = field(repr=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The state itself: detached tensors, as the forward pass computed them."""
        missing = [value for value in self.values if value not in self._data]
        if missing:
            raise TraceError(f"state {self.index} holds a value that no operation consumed: {missing[0].node.name()}")
        return tuple(self._data[value] for value in self.values)

    def tensor_of(self, value: Value) -> Tensor | None:
        """One of its values, detached; None where that is none of them, or no operation consumed it."""
        return self._data.get(value) if value in self.values else None

    @property
    def space(self) -> Space:
        """Flat coordinates of the state."""
        return Space([meta_of(value) for value in self.values], self.layouts)


@dataclass(frozen=True, eq=False)
class Step:
    """The map from one state to the next.

    Attributes:
        index: place in ``flow.steps``.
        name: what a person would call it; unique in the flow.
        module_path: path of the module that does most of its work, ``""`` when no module does.
        module_class: the class of that module.
        stack: the stack of like blocks that it belongs to (``"encoder.layers"``), ``""`` when it stands alone.
        kind: ``"step"`` (same space before and after) or ``"transition"`` (stem, downsampling, head).
        source: the state before.
        target: the state after.
        operations: names of the autograd nodes that it consists of, in order.
        notes: where its derivative is not, or may not be, that of what it computes.
    """

    index: int
    name: str
    module_path: str
    module_class: str
    stack: str
    kind: str
    source: State
    target: State
    operations: tuple[str, ...]
    notes: tuple[str, ...]
    segment: Segment = field(repr=False)
    products: Products = field(repr=False)

    def footprint(self) -> int:
        """Bytes alive at once, at most, for every cotangent that is pulled back."""
        return self.segment.footprint()[0]

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the target's tensors pulled back to the source's."""
        return self.segment.vjp(cotangents)

    def jacobian(self) -> Jacobian:
        """The Jacobian of the step, one block per sample, as an operator of shape ``(batch, m, n)``."""
        return jacobian_of(self.products)


@dataclass(frozen=True, eq=False)
class Flow:
    """One recorded forward pass as a chain of states and steps.

    Attributes:
        states: the states, from the source to the target.
        steps: ``steps[i]`` leads from ``states[i]`` to ``states[i + 1]``.
        output: what the model returned, still on the graph.
        target_name: path of the output that the flow leads to, or of several.
        target: what was asked for as the end, as `stabkit.trace` takes it.
        source_name: path of the input (or embedding) that it starts from.
        side_inputs: other inputs that could carry derivatives, held fixed here.
        batch: number of samples; 1 when the whole batch is one state.
        chain_error: relative difference between the chain's and the model's own VJP; None when it was not checked,
            NaN where no number was finite on both sides.
        notes: what the reader should know about how the flow was found.
        model: the module.
        forward_pass: the call that was recorded, to run it again.
        recorded: the operations of that call and the module calls around them, for readers of the graph.
    """

    states: tuple[State, ...]
    steps: tuple[Step, ...]
    output: Any = field(repr=False)
    target_name: str
    target: Target
    source_name: str
    side_inputs: tuple[str, ...]
    batch: int
    chain_error: float | None
    notes: tuple[str, ...]
    model: nn.Module = field(repr=False)
    forward_pass: ForwardPass = field(repr=False)
    recorded: RecordedPass = field(repr=False)
    _chains: Callable[[], dict[str, Flow]] = field(repr=False)
    _retrace: Callable[..., Flow] | None = field(default=None, repr=False, kw_only=True)
    _by_values: Callable[[], Flow] | None = field(default=None, repr=False, kw_only=True)
    _finite: bool | None = field(default=None, repr=False, kw_only=True)

    def again(self, *, check: bool = False, given: tuple[Any, Any] | None = None) -> Flow:
        """The same call traced anew, in the same way, at the weights and in the modes that the model has now.

        Args:
            check: whether the chain is held against the model's own VJP again; if exact, it is exact at other weights.
            given: positional and keyword arguments in the place of those of the call.

        Raises:
            TraceError: the call fails now, or this flow is a part of another, which alone can be traced anew.
        """
        if self._retrace is None:
            raise TraceError("this flow was taken out of another one; trace that one anew")
        return self._retrace(check) if given is None else self._retrace(check, given=given)

    def by_values(self) -> Flow | None:
        """The same call traced as if nothing were detached in it; None for a flow that was taken out of another one.

        Its states are all values that are carried on, its derivatives those of the values, and not those that train.

        Raises:
            TraceError: the call fails so, as where the model writes to what it has detached.
        """
        return None if self._by_values is None else self._by_values()

    def following(self, loss: Any) -> Flow:
        """The flow that leads to all outputs that a loss reads: this one, if it does, or the call traced to them.

        A variational autoencoder returns a reconstruction, a mean and a variance, and its loss reads all three. They
        then end the flow as one state, and a note says so.

        Args:
            loss: a callable on the model's output that returns a scalar.

        Raises:
            TraceError: the loss is not a differentiable scalar of the output, or depends on the input by something
                that the model does not return.

        Example:
            >>> import torch, stabkit
            >>> class Pair(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.body, self.a, self.b = (torch.nn.Linear(3, 3) for _ in range(3))
            ...     def forward(self, x):
            ...         h = self.body(x).tanh()
            ...         return self.a(h), self.b(h)
            >>> flow = stabkit.trace(Pair(), torch.ones(2, 3))
            >>> flow.following(lambda out: out[0].sum() + out[1].sum()).target_name
            '0, 1'
        """
        outputs = [tensor for _, tensor in named_tensors(self.output) if tensor.requires_grad]
        if len(outputs) == 1 and not callable(self.target):
            scalar_loss(loss, self.output)  # says what is wrong
            return self
        if self._covers(loss):
            return self
        paths = outputs_read(loss, self.output)
        if self._retrace is None or self.target == paths or not paths:
            self.cotangent(loss)  # says what is wrong
            raise TraceError("the loss depends on none of the model's outputs; compute it from its argument")
        joined = self._retrace(self.chain_error is not None, paths)
        joined.cotangent(loss)
        if len(paths) == 1:
            note = f"the flow leads to the output that the loss reads: {joined.target_name}"
        else:
            words = f"the loss reads {len(paths)} outputs; those made of {joined.source_name} end the flow as one state"
            note = f"{words}: {joined.target_name}"
        return replace(joined, notes=(*joined.notes, note))

    def _covers(self, loss: Any) -> bool:
        """Whether all of the gradient of a loss passes through the last state."""
        scalar = scalar_loss(loss, self.output)
        cotangents = self._gradient(scalar)
        return cotangents is not None and not self._bypassed(scalar, cotangents)

    @property
    def passes_finite(self) -> bool | None:
        """Whether a random cotangent came back finite when the chain was checked; None where that was not seen."""
        return self._finite if self.chain_error is not None else None

    @property
    def chains(self) -> dict[str, Flow]:
        """One flow for every input that leads to the target, by the name of its first stack of blocks.

        An encoder and a decoder, or the two towers of a contrastive model, are chains of the same recorded pass; each
        holds what the others bring fixed. This flow is the one that starts furthest from the target.
        """
        return self._chains()

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """The steps of every stack of like blocks, by its name."""
        found: dict[str, tuple[int, ...]] = {}
        for step in self.steps:
            if step.stack:
                found[step.stack] = (*found.get(step.stack, ()), step.index)
        return found

    def __len__(self) -> int:
        return len(self.steps)

    @shows_printable
    def __repr__(self) -> str:
        lines = [f"Flow of {type(self.model).__name__}: {len(self.steps)} steps, batch {self.batch}"]
        for step in self.steps:
            shapes = f"{list(step.source.sample_shapes)} -> {list(step.target.sample_shapes)}"
            lines.append(f"  {step.index:3d} {step.kind:10s} {step.name}: {shapes}")
        return "\n".join(lines)

    @property
    def over_time(self) -> bool:
        """False: the steps are layers, one after the other."""
        return False

    @property
    def step_size(self) -> None:
        """None: a step is a step."""

    @property
    def lengths(self) -> None:
        """None: all samples take all steps."""

    @property
    def sizes(self) -> list[int]:
        """Real coordinates per sample of every state."""
        return [state.size for state in self.states]

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype in which products are made."""
        return max((state.space.dtype for state in self.states), key=lambda dtype: torch.finfo(dtype).eps)

    def space_at(self, index: int) -> Space:
        """Flat coordinates of a state."""
        return self.states[index].space

    def flat_states(self) -> Iterator[Tensor]:
        """All states in order, ``(batch, size)`` each."""
        return (state.flatten() for state in self.states)

    def tangents(self, k: int, *, adjoint: bool = False) -> Iterator[Tangents]:
        """The derivatives of all steps, in the order in which vectors pass them; backwards with ``adjoint``."""
        for step in reversed(self.steps) if adjoint else self.steps:
            products = step.products
            yield Tangents(
                range(step.index, step.index + 1), multiply=products.backward if adjoint else products.forward
            )

    def jacobian(self, start: int = 0, stop: int | None = None) -> Jacobian:
        """The Jacobian of the map from ``states[start]`` to ``states[stop]`` (default: the last).

        Raises:
            OutOfRangeError: the two do not name states in this order.
        """
        last = len(self.states) - 1
        stop = last if stop is None else stop
        if not 0 <= start < stop <= last:
            raise OutOfRangeError(
                f"start={start}, stop={stop}; expected 0 <= start < stop <= {last} (the number of steps)"
            )
        if stop == start + 1:
            return self.steps[start].jacobian()
        source, target = self.states[start], self.states[stop]
        parameters = list(self.model.parameters())
        segment = self.recorded.segment(source.values, target.values, source.position, target.position, parameters)
        return jacobian_of(Products(segment, source.space, target.space))

    @property
    def graph(self) -> nx.DiGraph:
        """The operations as a directed graph; nodes are numbered by position and carry their module path."""
        import networkx as nx  # takes longer to import than most traces take to run

        graph = nx.DiGraph()
        graph.add_node(-1, operation="source", module_path="", step=-1)
        boundaries = [state.position for state in self.states]
        recorded = self.recorded.graph
        for position, node in enumerate(recorded.nodes):
            step = sum(1 for boundary in boundaries[1:] if boundary <= position)
            graph.add_node(position, operation=operation(node), module_path=self.recorded.path_of(node), step=step)
            for value in recorded.inputs[node]:
                graph.add_edge(recorded.rank.get(value.node, -1), position, shape=meta_of(value).shape)
        return graph

    def cotangent(self, loss: Any = None, *, seed: int = 0) -> list[Tensor]:
        """Cotangent of the last state: the gradient of a loss, or standard normal numbers.

        Args:
            loss: a callable on the model's output that returns a scalar, or None.
            seed: the seed of the random cotangent.

        Raises:
            TraceError: the loss is not a differentiable scalar, or reaches the source around the target.
        """
        if loss is None:
            return random_tensors(self.states[-1].values, seed)
        with self.recorded.graph.way_back:
            return self._cotangent(loss)

    def _cotangent(self, loss: Any) -> list[Tensor]:
        scalar = scalar_loss(loss, self.output)
        tensors = self._gradient(scalar)
        if tensors is None:
            raise TraceError(
                f"the loss does not depend on {self.target_name!r}, the output that the flow leads to; "
                "flow.following(loss) leads to those that it reads"
            )
        if self._bypassed(scalar, tensors):
            raise TraceError(
                f"part of the loss reaches the input around {self.target_name!r}, what the flow leads to; "
                "flow.following(loss) leads to all outputs that the loss reads, and what else it takes of the model "
                "must be returned by it"
            )
        return tensors

    def _gradient(self, scalar: Tensor) -> list[Tensor] | None:
        """The gradient of a scalar by the last state; None where it does not depend on it."""
        values = self.states[-1].values
        edges = [value.edge for value in values]
        with refusing_changed_weights():
            grads = torch.autograd.grad(scalar, edges, retain_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            return None
        return [
            torch.zeros(meta_of(v).shape, dtype=meta_of(v).dtype, device=meta_of(v).device) if g is None else g.detach()
            for v, g in zip(values, grads, strict=True)
        ]

    def _bypassed(self, scalar: Tensor, cotangents: list[Tensor]) -> bool:
        """Whether a part of the gradient of a loss does not pass through the last state."""
        source = self.states[0].values
        with refusing_changed_weights():
            total = torch.autograd.grad(scalar, [v.edge for v in source], retain_graph=True, allow_unused=True)
        through = engine_vjp(self.states[-1].values, source, cotangents)
        for whole, part in zip(total, through, strict=True):
            whole = torch.zeros_like(part) if whole is None else whole
            if bool((whole - part).norm() > 1e-3 * whole.norm() + 1e-30):
                return True
        return False


def engine_vjp(target: Sequence[Value], source: Sequence[Value], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The model's own VJP, by autograd's engine.

    ``torch.autograd.grad`` says the same, and imports sympy before that, to compare shapes.
    """
    edges, ends = (tuple(value.edge for value in values) for values in (target, source))
    with refusing_changed_weights():
        grads = _engine_run_backward(
            edges, tuple(cotangents), True, False, ends, allow_unreachable=True, accumulate_grad=False
        )
    metas = [meta_of(value) for value in source]
    return [
        torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if grad is None else grad
        for grad, meta in zip(grads, metas, strict=True)
    ]
