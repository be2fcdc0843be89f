"""Everything that a trace must leave alone, bit for bit."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .preparation import modules, named_inputs


def fingerprint(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Everything that a trace must leave alone, in a form that can be compared."""
    prints: dict[str, Any] = {
        "random state": bits(torch.get_rng_state()),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "fused attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "checkpoint function": id(torch.utils.checkpoint.CheckpointFunction),
        "global hooks": {
            name: len(hooks) for name, hooks in vars(nn.modules.module).items() if _is_hook_table(name, hooks)
        },
    }
    for name, tensor in named_inputs(args, kwargs):
        prints[f"input {name}"] = (bits(tensor), tensor.requires_grad, bits(tensor.grad))
    for path, module in modules(model):
        prints[f"training {path}"] = module.training
        for name, held in vars(module).items():
            if _is_hook_table(name, held):
                prints[f"{name} {path}"] = [(key, id(hook)) for key, hook in held.items()]
            elif name not in ("_parameters", "_buffers", "_modules", "training"):
                prints[f"attribute {path}.{name}"] = _identity(held)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            prints[f"parameter {path}.{name}"] = (id(parameter), bits(parameter), parameter.requires_grad)
            prints[f"gradient {path}.{name}"] = (id(parameter.grad), bits(parameter.grad))
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            prints[f"buffer {path}.{name}"] = (id(buffer), bits(buffer))
    return prints


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was."""
    return [name for name in {**before, **after} if before.get(name, ...) != after.get(name, ...)]


def _is_hook_table(name: str, held: Any) -> bool:
    return isinstance(held, dict) and name.endswith("_hooks")


def _identity(held: Any) -> Any:
    """A number or text itself, containers by what they hold, anything else by which object it is."""
    if isinstance(held, int | float | complex | str | bytes | None):
        return held
    if isinstance(held, dict):
        return id(held), [(str(key), id(item)) for key, item in held.items()]
    if isinstance(held, list | tuple | set):
        return id(held), [id(item) for item in held]
    return id(held)


def bits(tensor: Tensor | None) -> Any:
    """Dtype, shape and a checksum of the bytes of a tensor."""
    if tensor is None:
        return None
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "uninitialised"
    tensor = tensor.detach()
    tensor = tensor.int_repr() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), zlib.crc32(flat.view(torch.uint8).numpy())
