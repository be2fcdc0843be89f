"""The activations, norms and moves of torch: where one is added.

A recording shows modules by their class and operations by the name of their autograd node (``"Gelu"`` for
``GeluBackward0``); a function is shown by neither, only by what it calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation has it
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from stabkit.vocabulary.facts import ActivationFacts, Function, NormFacts

_INFINITY = math.inf


@dataclass(frozen=True)
class Family:
    """Activations that differ by parameters: a function, and its facts as a function of the same parameters.

    Attributes:
        name: what they are called.
        function: takes a tensor, and the parameters by name.
        facts: takes the parameters alone and gives the arguments of `ActivationFacts` from ``slope`` on.
        operations: the names of their autograd nodes; parameters are saved there by their names.
        sources: modules, which hold the parameters by their names, and functions that compute them.
        defaults: the parameters, with the values that torch gives them.
        costly: whether the derivative takes longer to compute than to multiply with.
    """

    name: str
    function: Function
    facts: Callable[..., tuple[Any, ...]]
    operations: tuple[str, ...] = ()
    sources: tuple[Any, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    costly: bool = False

    def of(self, parameters: Mapping[str, Any]) -> ActivationFacts:
        """The member of the family with these parameters, and the usual ones for the others."""
        own = {**self.defaults, **parameters}
        facts = ActivationFacts(self.name, *self.facts(**own))
        return replace(facts, parameters=own, function=partial(self.function, **own))


def _smooth(slope: tuple[float, float], limits: tuple[float, float]) -> Callable[[], tuple[Any, ...]]:
    return lambda: (slope, limits)


def _clipped(low: float, high: float) -> tuple[Any, ...]:
    kinks = tuple(filter(math.isfinite, (low, high)))
    return (0.0 if kinks else 1.0, 1.0), (low, high), kinks, True


def _clamped(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return x if min is None and max is None else x.clamp(min, max)


def _clamp(min: float | None = None, max: float | None = None) -> tuple[Any, ...]:
    return _clipped(-_INFINITY if min is None else float(min), _INFINITY if max is None else float(max))


def _bent(slope: float) -> tuple[Any, ...]:
    """Slope 1 above zero, another below."""
    below = -slope * _INFINITY if slope else 0.0
    return (min(slope, 1.0), max(slope, 1.0)), (below, _INFINITY), (0.0,), True


def _exponential(alpha: float, scale: float = 1.0, rate: float = 1.0) -> tuple[Any, ...]:
    """``scale * x`` above zero, ``scale * alpha * (exp(rate * x) - 1)`` below."""
    slopes = (0.0, scale, scale * alpha * rate)
    return (min(slopes), max(slopes)), (-scale * alpha, _INFINITY), (0.0,)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight.to(x))


def _prelu_facts(weight: Tensor) -> tuple[Any, ...]:
    low, high = (float(w) for w in weight.detach().aminmax())
    limits = _bent(low)[1] if low * high > 0 or low == high else (math.nan, _INFINITY)
    return (min(low, 1.0), max(high, 1.0)), limits, (0.0,), True


def _shrunk(lambd: float) -> tuple[Any, ...]:
    return (0.0, 1.0), (-_INFINITY, _INFINITY), (-lambd, lambd), True


_GELU = {"none": 1.1289041451851550, "tanh": 1.1289930686587720}  # largest slopes; the least are 1 minus these
FAMILIES = (
    Family("linear", lambda x: x, lambda: ((1, 1), (-_INFINITY, _INFINITY), (), True), (), (nn.Identity,)),
    Family("relu", torch.relu, partial(_bent, 0.0), ("Relu",), (nn.ReLU, F.relu, torch.relu)),
    Family("leaky_relu", F.leaky_relu, lambda negative_slope: _bent(negative_slope), ("LeakyRelu",),
            (nn.LeakyReLU, F.leaky_relu), {"negative_slope": 0.01}),
    Family("prelu", _prelu, _prelu_facts, ("PreluKernel",), (nn.PReLU,), {"weight": torch.tensor([0.25])}),
    Family("rrelu", F.rrelu, lambda lower, upper: _bent(lower), ("RreluWithNoise",), (nn.RReLU, F.rrelu),
            {"lower": 1 / 8, "upper": 1 / 3}),
    Family("tanh", torch.tanh, _smooth((0, 1), (-1, 1)), ("Tanh",), (nn.Tanh, torch.tanh, F.tanh)),
    Family("sigmoid", torch.sigmoid, _smooth((0, 0.25), (0, 1)), ("Sigmoid",),
            (nn.Sigmoid, torch.sigmoid, F.sigmoid)),
    Family("erf", torch.erf, _smooth((0, 2 / math.sqrt(math.pi)), (-1, 1)), ("Erf",), (torch.erf,), costly=True),
    Family("atan", torch.atan, _smooth((0, 1), (-math.pi / 2, math.pi / 2)), ("Atan",), (torch.atan,)),
    Family("sin", torch.sin, _smooth((-1, 1), (math.nan, math.nan)), ("Sin",), (torch.sin,)),
    Family("gelu", F.gelu, lambda approximate: ((1 - _GELU[approximate], _GELU[approximate]), (0, _INFINITY)),
            ("Gelu",), (nn.GELU, F.gelu), {"approximate": "none"}, costly=True),
    Family("silu", F.silu, _smooth((-0.0998393201288669, 1.0998393201288669), (0, _INFINITY)), ("Silu",),
            (nn.SiLU, F.silu), costly=True),
    Family("mish", F.mish, _smooth((-0.1125261223894627, 1.0884981612517280), (0, _INFINITY)), ("Mish",),
            (nn.Mish, F.mish), costly=True),
    Family("softplus", F.softplus, lambda beta, threshold: ((0, 1), (0, _INFINITY)), ("Softplus",),
            (nn.Softplus, F.softplus), {"beta": 1.0, "threshold": 20.0}, costly=True),
    Family("log_sigmoid", F.logsigmoid, _smooth((0, 1), (-_INFINITY, 0)), ("LogSigmoid",),
            (nn.LogSigmoid, F.logsigmoid), costly=True),
    Family("elu", torch.ops.aten.elu, lambda alpha, scale, input_scale: _exponential(alpha, scale, input_scale),
            ("Elu",), (nn.ELU, F.elu), {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}, costly=True),
    Family("celu", F.celu, lambda alpha: _exponential(alpha, rate=1 / alpha), ("Celu",), (nn.CELU, F.celu),
            {"alpha": 1.0}, costly=True),
    Family("hardswish", F.hardswish, lambda: ((-0.5, 1.5), (0, _INFINITY), (-3, 3)), ("Hardswish",),
            (nn.Hardswish, F.hardswish), costly=True),
    Family("hardsigmoid", F.hardsigmoid, lambda: ((0, 1 / 6), (0, 1), (-3, 3), True), ("Hardsigmoid",),
            (nn.Hardsigmoid, F.hardsigmoid), costly=True),
    Family("hardtanh", F.hardtanh, lambda min_val, max_val: _clipped(min_val, max_val), ("Hardtanh",),
            (nn.Hardtanh, F.hardtanh), {"min_val": -1.0, "max_val": 1.0}),
    Family("clamp", _clamped, _clamp, ("Clamp", "ClampMin", "ClampMax"), (), {"min": None, "max": None}),
    Family("threshold", F.threshold,
            lambda threshold, value: ((0, 1), (value, _INFINITY), (threshold,), True), ("Threshold",),
            (nn.Threshold, F.threshold), {"threshold": 0.0, "value": 0.0}),
    Family("softshrink", F.softshrink, _shrunk, ("Softshrink",), (nn.Softshrink, F.softshrink), {"lambd": 0.5}),
    Family("hardshrink", F.hardshrink, _shrunk, ("Hardshrink",), (nn.Hardshrink, F.hardshrink), {"lambd": 0.5}),
    Family("softsign", F.softsign, lambda: ((0, 1), (-1, 1), (0.0,)), (), (nn.Softsign, F.softsign)),
    Family("tanhshrink", F.tanhshrink, _smooth((0, 1), (-_INFINITY, _INFINITY)), (), (nn.Tanhshrink, F.tanhshrink)),
)  # fmt: skip
# names, and modules, of a family at some parameters
_SELU = {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}
SETTINGS: dict[str, tuple[str, Mapping[str, Any], tuple[Any, ...]]] = {
    "relu6": ("hardtanh", {"min_val": 0.0, "max_val": 6.0}, (nn.ReLU6, F.relu6)),
    "selu": ("elu", _SELU, (nn.SELU, F.selu, torch.selu)),
    "gelu_tanh": ("gelu", {"approximate": "tanh"}, ()),
}

NORMALISATIONS = (
    (NormFacts("batch_norm", ("batch", "positions"), True, True),
     ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"), (nn.modules.batchnorm._BatchNorm, SyncBatchNorm)),
    (NormFacts("instance_norm", ("positions",), True, True), (), (nn.modules.instancenorm._InstanceNorm,)),
    (NormFacts("layer_norm", ("features",), True), ("NativeLayerNorm",), (nn.LayerNorm,)),
    (NormFacts("group_norm", ("group", "positions"), True), ("NativeGroupNorm",), (nn.GroupNorm,)),
    (NormFacts("rms_norm", ("features",), False), ("FusedRmsNorm",), (nn.RMSNorm,)),
)  # fmt: skip

# operations that leave numbers what they are, by what they do with them
MOVES: dict[str, tuple[str, ...]] = {
    "reshape": ("Alias", "Reshape", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"),
    "permute": ("Flip", "Permute", "PixelShuffle", "PixelUnshuffle", "Roll", "T", "Transpose"),
    "copy": ("Clone", "Copy", "ToCopy"),
    "select": ("AsStrided", "Select", "Slice", "Split", "SplitWithSizes", "Unbind", "UnsafeSplit"),
    "gather": ("Gather", "Index", "IndexSelect"),
    "join": ("Cat", "Stack"),
    "expand": ("Expand",),
    "pad": ("ConstantPadNd",),
    "write": ("CopySlices", "IndexCopy", "MaskedScatter", "SelectScatter", "SliceScatter", "_UncheckedAssign"),
}
