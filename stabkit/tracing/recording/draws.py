"""Numbers that a forward pass draws: where they, or what is made of them, meet values on the graph."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch import Tensor

#: Operations that draw normal numbers.
NORMAL = frozenset({"normal", "normal_", "normal_functional", "randn", "randn_like"})
#: Operations that draw uniform numbers, or zeros and ones: of these masks are made, as dropout and stochastic depth do.
UNIFORM = frozenset({"bernoulli", "bernoulli_", "rand", "rand_like", "uniform", "uniform_"})
#: What increments of a Brownian motion are made with: scaled, added up, laid out, correlated by a matrix. A network
#: that is given noise bends it, and what it makes is followed no further.
LINEAR = frozenset(
    {
        "_to_copy", "_unsafe_view", "add", "add_", "addmm", "alias", "bmm", "cat", "chunk", "clone", "copy_", "cumsum",
        "detach", "diff", "div", "div_", "expand", "index", "index_select", "lift_fresh", "mm", "movedim", "mul",
        "mul_", "narrow", "neg", "permute", "pow", "reshape", "rsub", "select", "slice", "split", "split_with_sizes",
        "squeeze", "stack", "sub", "sub_", "sum", "t", "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip
#: What makes zeros and ones of uniform numbers, besides.
ROUNDS = frozenset({"bernoulli", "ceil", "ceil_", "floor", "floor_", "ge", "gt", "le", "lt", "round", "where"})


class Draws:
    """Follows drawn numbers through what is computed off the graph.

    Args:
        drawn: the operations that draw them.
        keeps: the operations whose results are followed.
        zeros: whether numbers that are all zero count: those of a mask do, and noise that zero multiplies is none.
    """

    def __init__(self, drawn: Collection[str], keeps: Collection[str], *, zeros: bool) -> None:
        self._drawn = drawn
        self._keeps = keeps
        self._zeros = zeros
        self._held: dict[int, weakref.ref[Tensor]] = {}

    def meet(self, name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether an operation of some name takes drawn numbers and values on the graph."""
        meets = False
        if name not in self._drawn:
            if not self._held or name not in self._keeps or not any(self._is_drawn(t) for t in given):
                return False
            meets = any(t.requires_grad for t in given)
            if meets and not (self._zeros or any(bool(t.any()) for t in given if self._is_drawn(t))):
                return False
        if not meets:
            self._held.update((id(t), weakref.ref(t)) for t in made)
        return meets

    def _is_drawn(self, tensor: Tensor) -> bool:
        entry = self._held.get(id(tensor))
        return entry is not None and entry() is tensor
