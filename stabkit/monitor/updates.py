"""How much an optimizer's step changes the parameters of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.monitor.parameters import Parameters, copies, local, norms_of

# Entries of a tensor from which the size of its update is estimated, to some 5 percent: each is in a cache line of its
# own, and four times as many were a third of all that a record costs beside the norms.
SAMPLED = 256


@dataclass
class Updates:
    """Norms of updates and of the parameters after them, still on the device.

    Attributes:
        owners: index of the block of each parameter.
        factors: what a sampled norm is multiplied by to stand for the whole tensor.
        changes: norms of the sampled updates.
        after: norms of the sampled parameters after them.
    """

    owners: list[int]
    factors: list[float]
    changes: list[Tensor]
    after: list[Tensor]


class UpdateSampler:
    """Watches optimizers by up to 256 evenly spaced entries of each parameter, during one training step.

    Hooks of the optimizers, on only between `on` and `off`, run before and after their step.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Parameters, failed: Callable[[Exception], None]
    ) -> None:
        self._optimizers = list(optimizers)
        self._index = {id(p): i for p, i in zip(parameters.tensors, parameters.owners.tolist(), strict=True)}
        self._failed = failed
        self._undo: list[Callable[[], None]] = []
        self._before: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._found: Updates | None = None

    def on(self) -> None:
        """Watch the coming step."""
        if not self._undo:
            for optimizer in self._optimizers:
                self._undo.append(optimizer.register_step_pre_hook(self._pre).remove)
                self._undo.append(optimizer.register_step_post_hook(self._post).remove)

    def off(self) -> None:
        """Remove the hooks."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._before.clear()

    def take(self) -> Updates | None:
        """What was seen since the last call; None when no optimizer has stepped."""
        found, self._found = self._found, None
        return found

    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            tensors = [p for p in params if p.grad is not None and id(p) in self._index]
            self._before[id(optimizer)] = (tensors, _sample(tensors))
        except Exception as error:  # an error here would end the training
            self._failed(error)

    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or id(optimizer) not in self._before:
            return
        try:
            tensors, before = self._before.pop(id(optimizer))
            if tensors:
                self._compare(tensors, before)
        except Exception as error:
            self._failed(error)

    @torch.no_grad()
    def _compare(self, tensors: list[Tensor], before: list[Tensor]) -> None:
        after = _sample(tensors)
        torch._foreach_sub_(before, after)
        if self._found is None:
            self._found = Updates([], [], [], [])
        self._found.owners += [self._index[id(p)] for p in tensors]
        self._found.factors += [
            (local(p).numel() / max(sample.numel(), 1) / copies(p)) ** 0.5
            for p, sample in zip(tensors, after, strict=True)
        ]
        self._found.changes += norms_of(before)
        self._found.after += norms_of(after)


@torch.no_grad()
def _sample(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of evenly spaced entries of each tensor, of those that this rank holds."""
    flat = [local(t).reshape(-1) for t in tensors]
    return [entries[:: max(1, entries.numel() // SAMPLED)].clone() for entries in flat]
