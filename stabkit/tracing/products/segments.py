"""The map between two states of a recorded forward pass, differentiated exactly by walking its own nodes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.errors import TraceError
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Meta, Value, meta_of, outputs_of, random_tensors, value_of
from stabkit.tracing.products.node_derivatives import alike, apply_node, is_python_node
from stabkit.tracing.products.stacked_cotangents import Stacked
from stabkit.tracing.recording.changed_weights import is_of_changed_weights, weights_changed

Tensors = list[Tensor]
Hook = Callable[[Tensor], Tensor | None]


@contextlib.contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let no parameter require grad.

    The nodes hold the parameters themselves; while a graph of the backward pass is built they must not join it, or
    every later product would compute weight gradients as well.
    """
    trainable = [p for p in parameters if p.requires_grad and not p.is_inference()]  # of the latter a graph has copies
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
        self._stacks: bool | None = None
        self._plan: list[Stacked] = []

    @property
    def recomputes(self) -> bool:
        """Whether saved tensors are computed anew when it is differentiated."""
        return self._prefetch is not None

    @property
    def stacks_by_rules(self) -> bool:
        """Whether it was walked with stacked cotangents that every node takes without ``torch.vmap``."""
        return bool(self._stacks) and all(stacked.by_rule for stacked in self._plan)

    def live(self, position: int) -> tuple[Value, ...]:
        """The values that everything after the first ``position`` nodes of the segment depends on."""
        made = set(self.nodes[position:])
        needed = [value for node in self.nodes[position:] for value in self.graph.inputs[node]]
        return tuple(dict.fromkeys(value for value in (*needed, *self.target) if value.node not in made))

    def part(self, start: int, stop: int) -> Segment:
        """The map through some of the nodes alone, between the values that are live before and after them."""
        source = self.source if start == 0 else self.live(start)
        target = self.target if stop == len(self.nodes) else self.live(stop)
        return self.between(source, target, start, stop)

    def between(self, source: Sequence[Value], target: Sequence[Value], start: int, stop: int) -> Segment:
        """The map from some values to others through the nodes ``start`` to ``stop`` of this segment."""
        inner = Segment(self.graph, source, target, 0, 0, self._parameters, self._hooks, self._prefetch)
        inner.nodes = self.nodes[start:stop]
        inner._from_source = self._from_source and start == 0
        if self._vmap["vjp"] == "right":  # then so are its nodes
            inner._vmap["vjp"] = "right"
        return inner

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

    def footprint(self) -> tuple[int, int]:
        """Bytes of all values alive at once while one cotangent is pulled back, at most, and of the widest value."""
        sizes: dict[Value, int] = {}
        alive: dict[Node, set[Value]] = {}  # by the node that made them
        now = most = 0

        def arrive(values: Iterable[Value]) -> None:
            nonlocal now
            for value in values:
                if value not in sizes:
                    meta = meta_of(value)
                    sizes[value] = meta.numel * meta.dtype.itemsize
                made = alive.setdefault(value.node, set())
                if value not in made:
                    made.add(value)
                    now += sizes[value]

        arrive(self.target)
        most = now
        for node in reversed(self.nodes):
            arrive(self.graph.inputs[node])
            most = max(most, now)
            now -= sum(sizes[value] for value in alive.pop(node, ()))
        ends = (meta.numel * meta.dtype.itemsize for meta in map(meta_of, self.source))
        return most, max((*sizes.values(), *ends))

    def vjp(self, cotangents: Sequence[Tensor]) -> Tensors:
        """Cotangents of the target pulled back to the source."""
        self._fetch()
        with self.graph.way_back, torch.no_grad():
            return fill(self._walk(cotangents), self.source_metas)

    def vjp_batch(self, cotangents: Sequence[Tensor]) -> Tensors:
        """The same for k cotangents at once, stacked along a new first dimension."""
        self._fetch()
        with self.graph.way_back:
            return self._batched("vjp", self.vjp, cotangents, self, list(range(len(self.target))), self.source_metas)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensors:
        """Tangents of the source pushed forward to the target, by a second reverse pass through the first.

        The VJP g(v) = J^T v is linear in v, so its own VJP with respect to v is J u.
        """
        with self.graph.way_back, torch.no_grad():
            backward, indices = self._linearize()
            return fill(backward._walk([tangents[i] for i in indices]), self.target_metas)

    def jvp_batch(self, tangents: Sequence[Tensor]) -> Tensors:
        """The same for k tangents at once, stacked along a new first dimension."""
        with self.graph.way_back:
            backward, indices = self._linearize()
            return self._batched("jvp", self.jvp, tangents, backward, indices, self.target_metas)

    def _fetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch()

    def release(self) -> None:
        """Forget the graph of the backward pass, and derivatives that were kept."""
        self._linearized = None
        for stacked in self._plan:
            stacked.forget()

    def _batched(
        self,
        direction: str,
        single: Callable[[Sequence[Tensor]], Tensors],
        stacked: Sequence[Tensor],
        walked: Segment,
        indices: list[int],
        metas: list[Meta],
    ) -> Tensors:
        """All vectors in one walk, or in a loop where some operation of the segment cannot be batched."""
        count = stacked[0].shape[0]
        if count > 1 and indices and self._vmap[direction] == "untested":
            # blocks of one kind are tested once
            kind = (direction, *map(alike, self.nodes))
            self._vmap[direction] = self.graph.batching.get(kind, "untested")
        if count > 1 and indices and self._vmap[direction] != "wrong":
            try:
                batched = walked._walk_many([stacked[i] for i in indices], metas)
            except (TraceError, RuntimeError, NotImplementedError, TypeError, ValueError):
                self._vmap[direction] = "wrong"  # sparse, numpy and solver backwards have no batching rule
            else:
                # forward products are held against those backwards before they are used (`Products`); where every node
                # takes stacked tangents by a rule of its own, that is test enough
                if self._vmap[direction] == "untested" and direction == "jvp" and walked.stacks_by_rules:
                    self._vmap[direction] = "right"
                if self._vmap[direction] == "untested":
                    # batching rules can be silently wrong (torch 2.14: the backward of cdist): test the sum of all
                    summed = single([tensor.sum(0) for tensor in stacked])
                    right = all(_close(part.sum(0), one) for part, one in zip(batched, summed, strict=True))
                    self._vmap[direction] = "right" if right else "wrong"
                    self.graph.batching[kind] = self._vmap[direction]
                if self._vmap[direction] == "right":
                    return batched
        results = [single([tensor[i] for tensor in stacked]) for i in range(count)]
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    def _walk_many(self, stacked: Sequence[Tensor], metas: list[Meta]) -> Tensors:
        """One walk for all cotangents: stacked through the nodes themselves, or the whole walk under ``torch.vmap``."""
        if self._stacks is None:
            self._stacks = not self._hooks and not any(map(is_python_node, self.nodes))
            inputs = self.graph.inputs
            keeps = not self.recomputes
            nodes = reversed(self.nodes) if self._stacks else ()
            self._plan = [Stacked(node, inputs[node], remembers=keeps) for node in nodes]
        if self._stacks:
            count = stacked[0].shape[0]
            with torch.no_grad():
                grads = self._walk_stacked(stacked)
            whole = [Meta((count, *meta.shape), meta.dtype, meta.device) for meta in metas]
            return fill(grads, whole)

        def one(*slices: Tensor) -> tuple[Tensor, ...]:
            return tuple(fill(self._walk(slices, rewrite=True), metas))

        with torch.no_grad(), warnings.catch_warnings():
            # operations without a batching rule of their own are looped over, which torch warns of
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return list(torch.vmap(one)(*stacked))

    def _walk_stacked(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """`_walk` for many cotangents at once; tensors that are done with are reused."""
        grads: dict[Value, Tensor] = {}
        own: set[Value] = set()  # whose tensor is held by nobody else
        for value, cotangent in zip(self.target, cotangents, strict=True):
            grads[value] = grads[value] + cotangent if value in grads else cotangent
        reused = {stacked.outputs[0] for stacked in self._plan if stacked.in_place}
        # every step of a loop over time may read a part of one value, which is then made whole once
        reused |= {stacked.part_of for stacked in self._plan if stacked.part_of is not None}
        for stacked in self._plan:
            outputs = stacked.outputs
            given = [grads.pop(outputs[0], None)] if len(outputs) == 1 else [grads.pop(v, None) for v in outputs]
            if given[0] is None and (len(given) == 1 or all(grad is None for grad in given)):
                continue
            mine = len(given) == 1 and outputs[0] in own
            try:
                if stacked.part_of in own and stacked.part_of in grads and given[0] is not None:
                    stacked.add_to(grads[stacked.part_of], given[0])
                    continue
                pulled = stacked.pull(given, overwrite=mine)
            except Exception as error:
                raise _failed_backward(stacked.node, error) from error
            alone = len(pulled) == 1 and len(given) == 1
            for value, grad in pulled:
                before = grads.get(value)
                fresh = False  # is asked only where somebody could write to it
                if before is not None or value in reused:
                    # the only result of the only cotangent, unless somebody else holds its memory
                    fresh = alone and _is_writable(grad) and (mine or not _shares(grad, given[0]))
                if before is None:
                    grads[value] = grad
                elif fresh:
                    grads[value] = grad.add_(before)
                else:
                    grads[value], fresh = before + grad, True
                if fresh:
                    own.add(value)
                else:
                    own.discard(value)
        return [grads.get(value) for value in self.source]

    def _walk(self, cotangents: Sequence[Tensor], *, rewrite: bool = False) -> list[Tensor | None]:
        grads: dict[Value, Tensor] = {}
        for value, cotangent in zip(self.target, cotangents, strict=True):
            grads[value] = grads[value] + cotangent if value in grads else cotangent
        for node in reversed(self.nodes):
            given = [self._hooked(value, grads.pop(value, None)) for value in outputs_of(node)]
            if all(g is None for g in given):
                continue
            try:
                pulled = apply_node(node, given, self.graph.inputs[node], rewrite=rewrite)
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
                grads = self._walk(seeds, rewrite=True)
            indices = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
            outputs = [value_of(grads[i]) for i in indices]  # type: ignore[arg-type]
            inputs = [value_of(seed) for seed in seeds]
            graph = Graph(inputs, outputs, prune=False)
            backward = Segment(graph, inputs, outputs, 0, len(graph.nodes))
            self._linearized = (seeds, backward, indices)
        return self._linearized[1], self._linearized[2]


def _shares(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_writable(tensor: Tensor) -> bool:
    """Whether every entry has memory of its own."""
    return tensor.is_contiguous() or not any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of additions."""
    eps = torch.finfo(a.dtype).eps
    return bool((a - b).abs().max() <= 1e3 * eps * b.abs().max()) if a.numel() and bool(b.isfinite().all()) else True


def _failed_backward(node: Node, error: Exception) -> TraceError:
    if is_of_changed_weights(error):
        return weights_changed()
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
