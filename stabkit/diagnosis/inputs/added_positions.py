"""A model with positions added to what it makes of its tokens, on trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.hooks import hooked


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch lie.

    Attributes:
        count: how many samples there are.
        positions: how many positions each has.
        axis: the axis of the inputs along which positions lie.
    """

    count: int
    positions: int
    axis: int

    def embedded(self, call: ForwardPass) -> str:
        """The first module whose result has one vector for each position; empty without one."""
        made: list[str] = []
        hooks = [
            module.register_forward_hook(
                lambda _m, _i, out, path=path: made.append(path) if self._is_sequence(out) else None
            )
            for path, module in call.module.named_modules()
            if path
        ]
        with hooked(hooks):
            evaluated(call)
        return made[0] if made else ""

    def with_positions(self, call: ForwardPass, place: str, *, shuffled: bool = False) -> Callable[..., Any]:
        """The model with sines of the position added to what one module returns, of the size that this has.

        Shuffled, every sample gets them in an order of its own, the same at every call.
        """
        draws = torch.Generator().manual_seed(call.seed)
        orders = torch.stack([torch.randperm(self.positions, generator=draws) for _ in range(self.count)])

        def add(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            # where positions lie in the inputs, unless the model has exchanged the axes
            along = self.axis if out.shape[self.axis] == self.positions else 1 - self.axis
            at = torch.arange(out.shape[along], dtype=torch.float64)[:, None]
            rates = 10_000.0 ** -(2 * torch.arange(out.shape[2]).div(2, rounding_mode="floor") / out.shape[2])
            angle = at * rates + math.pi / 2 * (torch.arange(out.shape[2]) % 2)
            encoding = (2**0.5 * angle.sin()).to(out) * out.detach().square().mean().sqrt()
            if shuffled:
                own = encoding[orders.to(out.device)]
                return out + (own if along == 1 else own.transpose(0, 1))
            return out + (encoding if along == 1 else encoding.unsqueeze(1))

        def model(*inputs: Any, **kwargs: Any) -> Any:
            hook = dict(call.module.named_modules())[place].register_forward_hook(add)
            with hooked([hook]):
                return call.model(*inputs, **kwargs)

        return model

    def _is_sequence(self, out: Any) -> bool:
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() != 3:
            return False
        return sorted(out.shape[:2]) == sorted((self.count, self.positions))
