"""Numbers that a forward pass draws: where normal ones, or what is made linearly of them, meet values on the graph."""

from __future__ import annotations

import weakref

from torch import Tensor

from stabkit.tracing.recording.inputs import differentiable

#: Operations that draw normal numbers. Uniform ones make masks, as dropout and stochastic depth do.
_DRAWS = frozenset({"normal", "normal_", "normal_functional", "randn", "randn_like"})
#: What increments of a Brownian motion are made with: scaled, added up, laid out, correlated by a matrix. A network
#: that is given noise bends it, and what it makes is followed no further.
_KEEPS = frozenset(
    {
        "_to_copy", "_unsafe_view", "add", "add_", "addmm", "alias", "bmm", "cat", "chunk", "clone", "copy_", "cumsum",
        "detach", "diff", "div", "div_", "expand", "index", "index_select", "lift_fresh", "mm", "movedim", "mul",
        "mul_", "narrow", "neg", "permute", "pow", "reshape", "rsub", "select", "slice", "split", "split_with_sizes",
        "squeeze", "stack", "sub", "sub_", "sum", "t", "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip


class Draws:
    """Follows drawn numbers through what is computed off the graph."""

    def __init__(self) -> None:
        self._held: dict[int, weakref.ref[Tensor]] = {}

    def meet(self, name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether an operation of some name takes drawn numbers and values on the graph."""
        meets = False
        if name not in _DRAWS:
            if not self._held or name not in _KEEPS or not any(self._is_drawn(t) for t in given):
                return False
            meets = any(t.requires_grad for t in given)
        if not meets:
            self._held.update((id(t), weakref.ref(t)) for t in made if differentiable(t))
        return meets

    def _is_drawn(self, tensor: Tensor) -> bool:
        entry = self._held.get(id(tensor))
        return entry is not None and entry() is tensor
