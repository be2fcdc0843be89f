"""What a pass for the curvature sets aside of a model, and what it reads of the process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from stabkit.errors import ArgumentError
from stabkit.tracing.recording.transparency import transparent
from stabkit.tracing.recording.untouched_model import Safe, aside


def refuse_unusable(parameters: Sequence[Tensor]) -> None:
    """Parameters without numbers have no curvature.

    Raises:
        ArgumentError: some are lazy, complex or on the meta device, or all are empty.
    """
    if any(isinstance(p, UninitializedParameter) for p in parameters):
        raise ArgumentError("the model has lazy modules whose parameters have no shape yet; call it once on a batch")
    if any(p.is_meta for p in parameters):
        raise ArgumentError(
            "parameters are on the meta device and hold no numbers; move the model with to_empty() and load its weights"
        )
    if any(p.is_complex() for p in parameters):
        raise ArgumentError(
            "some parameters are complex; hold their real and imaginary parts as real parameters (torch.view_as_real), "
            "in which curvature is defined"
        )
    if not sum(p.numel() for p in parameters):
        raise ArgumentError("the parameters of the model have no entries; there is no curvature to measure")


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a model on a device draws from, but for those of its own."""
    _, keys, place, *_ = np.random.get_state()  # noqa: NPY002
    numbers = torch.tensor([place, *np.asarray(keys).tolist()])
    found = [torch.get_rng_state(), torch.tensor(random.getstate()[1]), numbers]
    return found if device.type == "cpu" else [*found, torch.get_device_module(device).get_rng_state()]


@dataclass(frozen=True)
class Casting:
    """The regions of autocast that a call was made in: passes of the model run in them, what is made of them does not.

    Attributes:
        dtypes: by the type of the device.
    """

    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def active(cls, device: torch.device) -> Casting:
        """Those of the CPU and of a device."""
        types = {"cpu", device.type}
        return cls({each: torch.get_autocast_dtype(each) for each in types if torch.is_autocast_enabled(each)})

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """In them; weights that were cast off the graph are not kept for a pass on it."""
        with contextlib.ExitStack() as stack:
            for device, dtype in self.dtypes.items():
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Out of them."""
        with contextlib.ExitStack() as stack:
            for device in self.dtypes:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield


class TwiceDifferentiable(TorchFunctionMode):
    """Operations whose second derivative torch has wrong are made of others.

    Attributes:
        attends: whether attention was asked for that has fused kernels, in whose place plain ones are used.
        hooks: whether a tensor was hooked.
    """

    attends = False
    hooks = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch._weight_norm:  # up to torch 2.9 gradgradcheck fails on it
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.attends = True
        elif func is Tensor.register_hook:
            self.hooks = True
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def set_aside(module: nn.Module, *others: Any, given: Any) -> Iterator[tuple[Safe, TwiceDifferentiable]]:
    """A pass with plain gradients, that are none of the user's; the model comes back as it was.

    Args:
        module: the model.
        *others: functions that run with it.
        given: what it is called with.
    """
    with torch.inference_mode(False), aside(module, *others, given=given, watch=False) as safe, transparent():
        for part in module.modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                part.sparse = False  # sparse gradients have no second derivative
        safe.before_gradients()
        for parameter in module.parameters():
            parameter.grad = None  # what a closure does with gradients is none of the user's
        with TwiceDifferentiable() as seen:
            yield safe, seen


@contextlib.contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks that were registered on the parameters do not run: they may count, log, or change the gradient."""
    before = [(p, p._backward_hooks) for p in parameters]
    try:
        for p, hooks in before:
            if hooks:
                p._backward_hooks = None
        yield
    finally:
        for p, hooks in before:
            if p._backward_hooks is not hooks:
                p._backward_hooks = hooks
