"""What a reading needs to know about the model around a step: parameters by address, module calls, learned factors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.fields.shared import addresses
from stabkit.identification.form.chain import Link, chain
from stabkit.identification.form.normal_form import NormalForm, normal_form
from stabkit.identification.form.operations import CONTRACTIONS, PRODUCTS
from stabkit.identification.form.other_inputs import OTHERS, at_other_inputs
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots, collectors, laid_out_alike, slots, taken_whole
from stabkit.tracing import Flow
from stabkit.tracing.graph.loops import Loop, loops_of_calls, loops_outside_layers
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of

_MASKS = frozenset({"MaskedFill", "Where"})
_KEPT = 16  # pieces of one stretch, which its readers ask for again and again
#: How a factor may come from a learned number p: as code spells it, and as a function.
_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "{}": lambda p: p,
    "1 - {}": lambda p: 1 - p,
    "1 + {}": lambda p: 1 + p,
    "relu({})": torch.relu,
    "1 - relu({})": lambda p: 1 - torch.relu(p),
    "1 + relu({})": lambda p: 1 + torch.relu(p),
    "relu(1 - {})": lambda p: torch.relu(1 - p),
    "1 - relu(1 - {})": lambda p: 1 - torch.relu(1 - p),
    "sigmoid({})": torch.sigmoid,
    "1 - sigmoid({})": lambda p: 1 - torch.sigmoid(p),
    "exp({})": torch.exp,
    "tanh({})": torch.tanh,
}


class Surroundings:
    """A flow with what readings of its steps share.

    Attributes:
        flow: the flow.
        checks: whether numbers beside a reading are taken.
        names: parameters and buffers of the model by address.
        calls: calls of modules that are called more than once, as fields are: intervals of the clock, and the path.
        loops: whose rounds call modules again.
    """

    def __init__(self, flow: Flow, checks: bool = True) -> None:
        self.flow = flow
        self.checks = checks
        self.graph = flow.recorded.graph
        self.names = addresses(flow.model)
        self._modules = dict(flow.model.named_modules())
        calls = [c for c in flow.recorded.recording.calls if c.finished and c.stop > c.start]
        counts = Counter(c.path for c in calls)
        self.calls = tuple((c.start, c.stop, c.path) for c in calls if counts[c.path] > 1)
        self.loops = loops_of_calls(self.graph) or self._loops_that_were_cut()
        self.graph = self.graph.with_open_layers([state.position for state in flow.states])
        self._pieces: dict[object, Piece] = {}
        self._forms: dict[Piece, NormalForm] = {}
        self._elsewhere: dict[object, Surroundings | None] = {}

    def _loops_that_were_cut(self) -> tuple[Loop, ...]:
        """Loops that call no module, where the flow has a state between any two rounds."""
        positions = {state.position for state in self.flow.states}
        return tuple(loop for loop in loops_outside_layers(self.graph) if positions.issuperset(loop.boundaries))

    def most_called(self, start: int, stop: int) -> tuple[str, int] | None:
        """The module with weights that some steps call most often, the outermost one, and how often; None for once."""
        clocks = [*self.graph.clock, self.flow.recorded.recording.stop]
        first, last = (clocks[self.flow.states[i].position] for i in (start, stop))
        begun = self.flow.recorded.recording.begun(first, last)
        counts = Counter(c.path for c in begun if c.path and next(c.module.parameters(), None) is not None)
        path, often = max(counts.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
        return (path, often) if often > 1 else None

    @cached_property
    def reading_outside(self) -> frozenset[Node]:
        """The operations with an argument that carries gradients of something else than what depth is counted from."""
        return frozenset(
            node
            for node, known in self.graph.inputs.items()
            if sum(p is not None and Value(p, i) not in self.graph.constants for p, i in node.next_functions)
            > len(known)
        )

    def elsewhere(self) -> Iterator[Surroundings]:
        """The same model at other inputs, see `at_other_inputs`; where it does not run there it is left out."""
        for factors in OTHERS:
            if factors not in self._elsewhere:
                flow = at_other_inputs(self.flow, factors)
                self._elsewhere[factors] = None if flow is None else Surroundings(flow, checks=False)
            if (found := self._elsewhere[factors]) is not None:
                yield found

    def passing(self, maps: Mapping[Node, Value]) -> Surroundings:
        """The same with some maps taken as the identity; see `Graph.passing`."""
        other = copy.copy(self)
        other.graph = self.graph.passing(maps)
        other._pieces, other._forms = {}, {}
        return other

    def holding(self, made: Collection[Node]) -> Surroundings:
        """The same with what some operations make held fixed, as constants are."""
        inputs = {n: [v for v in known if {n, v.node}.isdisjoint(made)] for n, known in self.graph.inputs.items()}
        other = copy.copy(self)
        other.graph = self.graph.along(self.graph.nodes, inputs)
        other._pieces, other._forms = {}, {}
        return other

    def nodes(self, start: int, stop: int) -> list[Node]:
        """The operations between two states; saved tensors that were forgotten are computed again first."""
        before, after = self.flow.states[start].position, self.flow.states[stop].position
        prefetch = self.flow.recorded.prefetch(before, after)
        if prefetch is not None:
            prefetch()
        return self.graph.nodes[before:after]

    def slots(self, start: int, stop: int) -> Slots:
        """The states of the method between two states of the flow."""
        found = slots(self.flow, start, stop, self.loops)
        if len(found.sources) != 1 or len(found.targets) != 1:
            return found
        last = collectors(self.flow)
        read = [node for node in self.nodes(start, stop) if node not in last]
        if (whole := taken_whole(self.graph, read, found.sources[0])) is not None:
            found = replace(found, sources=(whole,))
        before, after = meta_of(found.sources[0]), meta_of(found.targets[0])
        if before.shape == after.shape or before.numel != after.numel:
            return found
        return laid_out_alike(self.graph, self.nodes(start, stop), found)

    def chain(self, start: int, stop: int, found: Slots, owned: Collection[Node] = ()) -> tuple[Link, ...]:
        """The links of a method of one state."""
        whole = self.whole(start, stop, replace(found, sources=found.sources[:1], targets=found.targets[:1]))
        return chain(whole, self.form_of, owned)

    def normal_form(self, start: int, stop: int, found: Slots, owned: Collection[Node] = ()) -> NormalForm:
        """The normal form of a method of several states."""
        return self.form_of(self.whole(start, stop, found, owned))

    def form_of(self, piece: Piece) -> NormalForm:
        """The normal form of some operations."""
        if piece not in self._forms:
            self._forms[piece] = normal_form(piece, names=self.names, calls=self.calls)
        return self._forms[piece]

    def whole(self, start: int, stop: int, found: Slots, owned: Collection[Node] = ()) -> Piece:
        """All operations of a method as one piece, some of which belong to its fields."""
        nodes = self.nodes(start - found.earlier, stop)
        return self.piece(nodes, found.sources, found.targets, found.contexts, owned)

    def piece(
        self,
        nodes: Sequence[Node],
        sources: Sequence[Value],
        targets: Sequence[Value],
        contexts: Sequence[Value] = (),
        owned: Collection[Node] = (),
    ) -> Piece:
        """Some operations, sorted; arguments as for `Piece`. Those of the last few calls are kept."""
        key = (tuple(nodes), tuple(sources), tuple(targets), tuple(contexts), frozenset(owned))
        if key not in self._pieces:
            if len(self._pieces) >= _KEPT:
                self._pieces.clear()
                self._forms.clear()
            self._pieces[key] = Piece(self.graph, nodes, sources, targets, contexts=contexts, owned=owned)
        return self._pieces[key]

    def learned_factors(self, piece: Piece) -> tuple[str, ...]:
        """Which parameters the constant factors on linear paths come from, as far as simple functions explain them."""
        return tuple(dict.fromkeys(text for _, text in self._factors(piece) if text is not None))

    def scales_channels(self, piece: Piece, atom: Value) -> bool:
        """Whether learned numbers, or a buffer's, multiply what an atom gives to a new state, entry by entry alone.

        Weights that an axis of stages is contracted with, masks and drawn numbers make a diagonal as well.
        """
        way: set[Value] = {atom}
        factors: list[tuple[Node, Tensor]] = []
        path = {node for target in piece.targets for node in piece.expand(target)[1]}
        for node in piece.nodes:
            if node not in path or way.isdisjoint(piece.linear[node]):
                continue
            way.update(outputs_of(node))
            if operation(node) in _MASKS or operation(node) in CONTRACTIONS:
                return False
            if operation(node) in PRODUCTS and (factor := _factor(node)) is not None and factor.numel() > 1:
                factors.append((node, factor))
        return bool(factors) and all(self._is_learned(node, factor) for node, factor in factors)

    def _is_learned(self, node: Node, factor: Tensor) -> bool:
        """Whether a factor is a parameter or a buffer, a part of one, or rises or falls with one around it."""
        place = factor.data_ptr()
        if any(begin <= place < end for begin, end in self._stretches):
            return True
        if node._sequence_nr() in self.graph.noisy:
            return False
        module = self._modules.get(self.flow.recorded.path_of(node))
        own = [] if module is None else [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return any(t.numel() == factor.numel() and _is_monotone(t, factor) for t in own)

    @cached_property
    def _stretches(self) -> tuple[tuple[int, int], ...]:
        """The memory of parameters and buffers."""
        held = [t for t in (*self.flow.model.parameters(), *self.flow.model.buffers()) if t.layout == torch.strided]
        return tuple((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held if t.is_contiguous())

    def has_fed_factor(self, piece: Piece) -> bool:
        """Whether a factor on a linear path is made of another input of the model, which is held fixed."""
        return any(_is_fed(node) for node, _ in self._products(piece))

    def _factors(self, piece: Piece) -> Iterator[tuple[Tensor, str | None]]:
        """The constant factors on linear paths, each with the parameter that it comes from."""
        for node, inputs in self._products(piece):
            factor = _factor(node) if len(inputs) == 1 else None
            if factor is not None:
                yield factor, self._origin(node, factor)

    def _products(self, piece: Piece) -> Iterator[tuple[Node, Sequence[Value]]]:
        """The products on linear paths, with what they read on these."""
        paths = {node for target in piece.targets for node in piece.expand(target)[1]}
        return ((n, inputs) for n, inputs in piece.linear.items() if n in paths and operation(n) in PRODUCTS)

    def _origin(self, node: Node, factor: Tensor) -> str | None:
        if factor.data_ptr() in self.names:
            return self.names[factor.data_ptr()]
        path = self.flow.recorded.path_of(node)
        if path not in self._modules:
            return None
        for name, parameter in self._modules[path].named_parameters(recurse=False):
            if parameter.numel() != factor.numel() or not parameter.is_floating_point():
                continue
            p = parameter.detach().reshape(-1).to(factor.dtype)
            for spelling, function in _FORMS.items():
                if torch.allclose(function(p), factor.reshape(-1), rtol=8 * torch.finfo(factor.dtype).eps, atol=0.0):
                    return spelling.format(f"{path}.{name}" if path else name)
        return None


def _is_monotone(parameter: Tensor, factor: Tensor) -> bool:
    """Whether one rises or falls with the other, entry by entry: as exp(p) does, or a clamp."""
    if not parameter.is_floating_point():
        return False
    steps = factor.reshape(-1)[parameter.detach().reshape(-1).argsort()].diff()
    return bool((steps >= 0).all() or (steps <= 0).all())


def _is_fed(node: Node) -> bool:
    """Whether one of two factors was made with derivatives, and by no operation of the graph."""
    saved = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    return any(isinstance(t, Tensor) and t.grad_fn is not None for t in saved)


def _factor(node: Node) -> Tensor | None:
    saved: list[Any] = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    constant = [t for t in saved if isinstance(t, Tensor) and t.grad_fn is None and t.is_floating_point()]
    return constant[0].detach() if len(constant) == 1 else None
