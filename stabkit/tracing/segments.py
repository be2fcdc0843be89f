"""The map between two states of a recorded forward pass, differentiated exactly by walking its own nodes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.errors import TraceError
from stabkit.tracing.graph import Graph
from stabkit.tracing.nodes import apply_node
from stabkit.tracing.values import Meta, Value, meta_of, random_tensors, value_of

Tensors = list[Tensor]
Hook = Callable[[Tensor], Tensor | None]


@contextlib.contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let no parameter require grad.

    The nodes hold the parameters themselves; while a graph of the backward pass is built they must not join it, or
    every later product would compute weight gradients as well.
    """
    trainable = [p for p in parameters if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class Segment:
    """The nodes between two positions of a graph, as a differentiable map from one frontier to the next.

    The engine of autograd gives *total* derivatives: with x and h(x) both in the state it runs through h into x. A
    chain needs the *partial* ones, so the nodes of the segment, and only these, are applied by hand.

    Args:
        graph: the recorded operations.
        source: values at the beginning.
        target: values at the end; values in both are carried unchanged.
        start: first position.
        stop: last position.
        parameters: parameters of the model, frozen while a double-backward graph is built.
        hooks: tensor hooks of the model, which change the gradient of a value once it is complete.
        prefetch: called before the nodes are applied, to bring back saved tensors that were forgotten.
    """

    def __init__(
        self,
        graph: Graph,
        source: Sequence[Value],
        target: Sequence[Value],
        start: int,
        stop: int,
        parameters: Sequence[nn.Parameter] = (),
        hooks: Mapping[Value, Sequence[Hook]] | None = None,
        prefetch: Callable[[], None] | None = None,
    ) -> None:
        self.graph = graph
        self.source = tuple(source)
        self.target = tuple(target)
        self.nodes = graph.nodes[start:stop]
        self._parameters = parameters
        self._hooks = hooks or {}
        self._prefetch = prefetch
        self._from_source = start == 0
        self._linearized: tuple[Tensors, Segment, list[int]] | None = None
        self._vmap = {"vjp": "untested", "jvp": "untested"}

    @property
    def source_metas(self) -> list[Meta]:
        """Shape, dtype and device of every source value."""
        return [meta_of(value) for value in self.source]

    @property
    def target_metas(self) -> list[Meta]:
        """Shape, dtype and device of every target value."""
        return [meta_of(value) for value in self.target]

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all values that the segment passes through."""
        return {meta_of(value).dtype for node in self.nodes for value in self.graph.inputs[node]}

    def vjp(self, cotangents: Sequence[Tensor]) -> Tensors:
        """Cotangents of the target pulled back to the source."""
        self._fetch()
        with torch.no_grad():
            return fill(self._walk(cotangents), self.source_metas)

    def vjp_batch(self, cotangents: Sequence[Tensor]) -> Tensors:
        """The same for k cotangents at once, stacked along a new first dimension."""
        self._fetch()
        return self._batched("vjp", self.vjp, cotangents, lambda *one: tuple(fill(self._walk(one), self.source_metas)))

    def jvp(self, tangents: Sequence[Tensor]) -> Tensors:
        """Tangents of the source pushed forward to the target, by a second reverse pass through the first.

        The VJP g(v) = J^T v is linear in v, so its own VJP with respect to v is J u.
        """
        backward, indices = self._linearize()
        with torch.no_grad():
            return fill(backward._walk([tangents[i] for i in indices]), self.target_metas)

    def jvp_batch(self, tangents: Sequence[Tensor]) -> Tensors:
        """The same for k tangents at once, stacked along a new first dimension."""
        backward, indices = self._linearize()

        def one(*slices: Tensor) -> tuple[Tensor, ...]:
            return tuple(fill(backward._walk([slices[i] for i in indices]), self.target_metas))

        return self._batched("jvp", self.jvp, tangents, one)

    def _fetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch()

    def release(self) -> None:
        """Forget the graph of the backward pass."""
        self._linearized = None

    def _batched(
        self,
        direction: str,
        single: Callable[[Sequence[Tensor]], Tensors],
        stacked: Sequence[Tensor],
        mapped: Callable[..., tuple[Tensor, ...]],
    ) -> Tensors:
        """One ``torch.vmap``, or a loop where some operation of the segment cannot be batched."""
        count = stacked[0].shape[0]
        if count > 1 and self._vmap[direction] != "wrong":
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    # operations without a batching rule of their own are looped over, which torch warns of
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    batched = list(torch.vmap(mapped)(*stacked))
            except (TraceError, RuntimeError, NotImplementedError, TypeError, ValueError):
                self._vmap[direction] = "wrong"  # sparse, numpy and solver backwards have no batching rule
            else:
                if self._vmap[direction] == "untested":
                    # batching rules can be silently wrong (torch 2.14: the backward of cdist): test the sum of all
                    summed = single([tensor.sum(0) for tensor in stacked])
                    right = all(_close(part.sum(0), one) for part, one in zip(batched, summed, strict=True))
                    self._vmap[direction] = "right" if right else "wrong"
                if self._vmap[direction] == "right":
                    return batched
        results = [single([tensor[i] for tensor in stacked]) for i in range(count)]
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    def _walk(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        grads: dict[Value, Tensor] = {}
        for value, cotangent in zip(self.target, cotangents, strict=True):
            grads[value] = grads[value] + cotangent if value in grads else cotangent
        for node in reversed(self.nodes):
            outputs = len(node._input_metadata)
            given = [self._hooked(Value(node, i), grads.pop(Value(node, i), None)) for i in range(outputs)]
            if all(g is None for g in given):
                continue
            try:
                pulled = apply_node(node, given, self.graph.inputs[node])
            except Exception as error:
                raise _failed_backward(node, error) from error
            for value, grad in pulled:
                grads[value] = grads[value] + grad if value in grads else grad
        if self._from_source:
            return [self._hooked(value, grads.get(value)) for value in self.source]
        return [grads.get(value) for value in self.source]

    def _hooked(self, value: Value, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        for hook in self._hooks.get(value, ()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    def _linearize(self) -> tuple[Segment, list[int]]:
        """The backward pass of this segment as a segment of its own, from its cotangents to its gradients."""
        if self._linearized is None:
            self._fetch()
            seeds = [seed.requires_grad_() for seed in random_tensors(self.target, 0)]
            with torch.enable_grad(), frozen(self._parameters):
                grads = self._walk(seeds)
            indices = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
            outputs = [value_of(grads[i]) for i in indices]  # type: ignore[arg-type]
            inputs = [value_of(seed) for seed in seeds]
            graph = Graph(inputs, outputs, prune=False)
            backward = Segment(graph, inputs, outputs, 0, len(graph.nodes))
            self._linearized = (seeds, backward, indices)
        return self._linearized[1], self._linearized[2]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of additions."""
    eps = torch.finfo(a.dtype).eps
    return bool((a - b).abs().max() <= 1e3 * eps * b.abs().max()) if a.numel() and bool(b.isfinite().all()) else True


def _failed_backward(node: Node, error: Exception) -> TraceError:
    if "modified by an inplace operation" in str(error):
        return TraceError(
            "the model's weights were changed after it was traced, so its derivatives are gone: call stabkit.trace "
            "again. (If nothing changed them, the forward pass overwrites its own parameters, by clamping or "
            "renormalising them: apply that change beforehand)"
        )
    message = " ".join(str(error).split())[:300]
    return BackwardError(f"the backward of {type(node).__name__} failed: {type(error).__name__}: {message}", node)


class BackwardError(TraceError):
    """One node of the recorded graph could not be applied."""

    def __init__(self, message: str, node: Node) -> None:
        super().__init__(message)
        self.node = node


def fill(tensors: Sequence[Tensor | None], metas: Sequence[Meta]) -> Tensors:
    """Zeros where nothing flows."""
    return [
        torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if tensor is None else tensor
        for tensor, meta in zip(tensors, metas, strict=True)
    ]
