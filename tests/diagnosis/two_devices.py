"""A second device that is none: tensors on it refuse to meet those on the first, as they do where there are two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

OTHER = torch.device("cuda", 0)


class Elsewhere(Tensor):
    """A tensor that says that it is on the other device."""

    device = OTHER  # type: ignore[assignment]


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Elsewhere)


class TwoDevices(TorchFunctionMode):
    """Within it tensors of both devices are moved, made and copied, and computed with on one at a time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is Tensor.to:
            return self._moved(*args, **kwargs)
        if kwargs.get("device") == OTHER:
            return elsewhere(func(*args, **{k: v for k, v in kwargs.items() if k != "device"}))
        given = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, tuple | list) else (a,))]
        places = {isinstance(t, Elsewhere) for t in given if isinstance(t, Tensor) and t.dim() > 0}
        if len(places) > 1 and name not in ("__setitem__", "copy_"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two devices")
        return func(*args, **kwargs)

    def _moved(self, tensor: Tensor, to: Any) -> Tensor:
        plain = tensor.as_subclass(Tensor)
        if isinstance(to, torch.dtype):
            return plain.to(to).as_subclass(type(tensor))
        plain = plain.to(to.dtype) if isinstance(to, Tensor) else plain
        return elsewhere(plain) if (to.device if isinstance(to, Tensor) else to) == OTHER else plain
