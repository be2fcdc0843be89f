"""Parameters that Hugging Face's ``device_map`` keeps elsewhere, on disk or on the host, until their module runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def values_of(module: nn.Module, name: str) -> Tensor | None:
    """The values of a module's own parameter, also when they are offloaded; None where nobody can say.

    ``accelerate`` leaves parameters on the meta device and fetches them in a hook of the module.

    Args:
        module: that the parameter belongs to.
        name: what the tensor is called in that module.

    Example:
        >>> values_of(nn.Linear(3, 2), "weight").shape
        torch.Size([2, 3])
    """
    parameter = module._parameters[name]
    if parameter is None or not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        stored = getattr(hook, "weights_map", None)
        if isinstance(stored, Mapping) and name in stored:
            found: Tensor = stored[name]
            return found
    return None


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
