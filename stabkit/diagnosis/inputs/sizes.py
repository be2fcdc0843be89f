"""Inputs far larger than 1, and the call in which they are divided by their size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from stabkit.diagnosis.inputs.derivatives import differentiates
from stabkit.diagnosis.inputs.features import FAR, changed
from stabkit.tracing import Flow
from stabkit.tracing.recording.forward_pass import ForwardPass

#: where inputs are scaled of which derivatives are taken
INSIDE = (
    "inside of the network, in front of its first layer: the derivatives that the model takes stay those by what it is "
    "given, and of data that are scaled where they are read they would be others"
)


@dataclass(frozen=True)
class Sizes:
    """Inputs that are far too large.

    Attributes:
        by_name: path and root mean square of each, that which depth is counted from first.
        inside: whether the model takes derivatives, so that they can be divided inside of the network alone.
    """

    by_name: tuple[tuple[str, float], ...]
    inside: bool = False

    @property
    def size(self) -> float:
        """That of the input which depth is counted from."""
        return self.by_name[0][1]

    @property
    def remedy(self) -> str:
        """What is to be done about it, in words."""
        if len(self.by_name) == 1:
            return brought_to_one(self.size, inside=self.inside)
        each = ", ".join(f"{name!r} by {size:.3g}" for name, size in self.by_name)
        if self.inside:
            return f"divide the inputs by their root mean squares ({each}) {INSIDE}"
        return f"divide the inputs where the data are read by their root mean squares ({each}); or standardise them"

    def divided(self, call: ForwardPass) -> ForwardPass:
        """The same call of these inputs over their sizes; all others stay as they are."""
        given, sizes = dict(call.given), dict(self.by_name)
        by = {id(given[name]): sizes[name] for name in sizes}
        return changed(call, lambda tensor: tensor / by[id(tensor)] if id(tensor) in by else tensor)


def brought_to_one(size: float, *, inside: bool = False) -> str:
    """What is to be done about an input of some size, in words; a division is what was tried."""
    if inside:
        return f"divide the input by {size:.3g}, its root mean square, {INSIDE}"
    return f"divide the input where the data are read by {size:.3g}, its root mean square; or standardise it"


def large_inputs(flow: Flow) -> Sizes | None:
    """Inputs of floats that are far too large: that which depth is counted from, and others of as many dimensions.

    A time or a weight for each sample beside them is no data. None where the first is not too large.
    """
    given = dict(flow.forward_pass.given)
    source = given.get(flow.source_name)
    if source is None or not _is_large(source):
        return None
    others = [n for n, t in given.items() if t is not source and 1 < t.dim() == source.dim() and _is_large(t)]
    by_name = tuple((name, _size(given[name])) for name in (flow.source_name, *others))
    return Sizes(by_name, inside=differentiates(flow.forward_pass))


def _is_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and FAR <= _size(tensor) < math.inf


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())
