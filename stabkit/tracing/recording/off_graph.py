"""What is made of the inputs of a model off the graph: masks, indices, detached numbers; and where Python reads it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from stabkit.tracing.recording.inputs import VALUE_FREE, differentiable

#: In the place of the operation that a tensor was made from: an input itself, or too many to keep count of.
INPUT = -1
_MOST = 16  # operations that are kept; a no_grad part of a model is made from one or two
#: Operations that hand numbers of a tensor to Python: ``.item()``, ``float(x)``, ``if x.any():``.
_READS = frozenset({"_local_scalar_dense", "equal"})


class OffGraph:
    """Follows what depends on an input of the model and carries no gradient.

    Args:
        inputs: those that cannot carry one: integers, masks.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self._inputs = tuple(inputs)  # kept, so that no other tensor takes their place
        self._held = {id(t): (weakref.ref(t), frozenset({INPUT})) for t in self._inputs}

    def follow(
        self, name: str, given: list[Tensor], on_graph: list[Tensor], made: list[Tensor], leaves: bool
    ) -> tuple[frozenset[int], bool]:
        """Note what an operation makes of such tensors.

        Args:
            name: the operation.
            given: what it is given.
            on_graph: those of them that carry a gradient.
            made: what it makes.
            leaves: whether that carries none, since the operation detaches it or gradients are off.

        Returns:
            Where those that it brings together with values on the graph left it, as numbers of operations, or `INPUT`;
            and whether it hands numbers to Python.
        """
        if name in VALUE_FREE:
            return frozenset(), False
        held = frozenset[int]()
        for tensor in given if self._held else ():
            entry = self._held.get(id(tensor))
            if entry is not None and entry[0]() is tensor and not tensor.requires_grad:
                held |= entry[1]
        if not held and not on_graph:
            return held, False
        left = [t for t in made if leaves or not on_graph or not differentiable(t)]
        if left:
            nodes = [tensor.grad_fn for tensor in on_graph]
            origins = held.union(INPUT if node is None else node._sequence_nr() for node in nodes)
            origins = origins if len(origins) <= _MOST else frozenset({INPUT})
            self._held.update((id(t), (weakref.ref(t), origins)) for t in left)
        return (held if on_graph else frozenset()), name in _READS

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on an input and carries no gradient."""
        entry = self._held.get(id(tensor))
        return entry is not None and entry[0]() is tensor and not tensor.requires_grad
