"""Mean and spread of the features of an input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass

FAR = 10.0  # root mean square of an input from which its size is a cause
_APART = 10.0  # factor between sizes of features, from which a trial is worth its time
OFFSET = 5.0  # spreads that a mean lies away from zero, from which it is
_FEWEST = 8  # samples whose mean and spread tell something


@dataclass(frozen=True)
class Features:
    """Mean and spread of every feature of an input.

    Attributes:
        name: path of the input.
        axis: along which features lie.
        mean: the mean of each feature.
        spread: the standard deviation of each feature.
    """

    name: str
    axis: int
    mean: Tensor
    spread: Tensor

    @property
    def sizes(self) -> Tensor:
        """Root mean square of the features that vary."""
        return (self.mean.square() + self.spread.square()).sqrt()[self.spread > 0]

    @property
    def far(self) -> bool:
        """Whether sizes or offsets are such that a trial is worth its time."""
        return self.uneven or bool((self.sizes > FAR).any())

    @property
    def uneven(self) -> bool:
        """Whether no single factor brings all features to mean 0 and spread 1, or nearly."""
        return self.apart > _APART or self.offset > OFFSET

    @property
    def apart(self) -> float:
        """Factor between the largest size and the smallest."""
        return float(self.sizes.max() / self.sizes.min()) if self.sizes.numel() else 1.0

    @property
    def offset(self) -> float:
        """Spreads that a mean lies away from zero, at most."""
        varying = self.spread > 0
        return float((self.mean.abs() / self.spread)[varying].max()) if bool(varying.any()) else 0.0

    def standardised(self, tensor: Tensor) -> Tensor:
        """The input with mean 0 and spread 1 in every feature that varies."""
        shape = [-1 if i == self.axis else 1 for i in range(tensor.dim())]
        spread = torch.where(self.spread > 0, self.spread, 1.0)
        return ((tensor.double() - self.mean.reshape(shape)) / spread.reshape(shape)).to(tensor)

    @property
    def farthest(self) -> int:
        """The varying feature whose size is farthest from that of the others; the one off zero where sizes agree."""
        sizes = (self.mean.square() + self.spread.square()).sqrt()
        if self.apart > _APART or len(self.mean) == 1:
            logs = sizes.log().where(self.spread > 0, math.nan)
            return int((logs - logs.nanmedian()).abs().nan_to_num(-1.0).argmax())
        return int((self.mean.abs() / self.spread).where(self.spread > 0, -1.0).argmax())

    @property
    def words(self) -> str:
        """The features at the ends."""
        order = torch.argsort((self.mean.square() + self.spread.square()).where(self.spread > 0, math.nan))
        last = int((self.spread > 0).sum()) - 1
        offset = int((self.mean.abs() / self.spread).nan_to_num(0.0, posinf=0.0).argmax())
        shown = dict.fromkeys([int(order[last]), int(order[0]), offset])
        return ", ".join(f"{i}: {float(self.mean[i]):.3g} +- {float(self.spread[i]):.3g}" for i in shown)


def changed(call: ForwardPass, change: Callable[[Tensor], Tensor]) -> ForwardPass:
    """The same call with every tensor that it is given changed."""
    inputs, kwargs = map_tensors([call.inputs, call.kwargs], change)
    return replace(call, inputs=tuple(inputs), kwargs=kwargs)


def features_of(flow: Flow, name: str, tensor: Tensor) -> Features | None:
    """Mean and spread along the features of an input of floats; None for masks and for what has none."""
    by_channel = any("Convolution" in operation(node) for node in flow.steps[0].segment.nodes)
    return features_along(name, tensor, 1 if by_channel or tensor.dim() > 3 else tensor.dim() - 1)


def features_along(name: str, tensor: Tensor, axis: int) -> Features | None:
    """The same along a given axis."""
    if not tensor.is_floating_point() or tensor.dim() < 2 or len(tensor) < _FEWEST or tensor.layout != torch.strided:
        return None
    numbers = tensor.detach().double()
    if not bool(numbers.isfinite().all()) or bool(((numbers == 0) | (numbers == 1)).all()):
        return None
    others = [i for i in range(tensor.dim()) if i != axis]
    return Features(name, axis, numbers.mean(others), numbers.std(others, correction=0))
