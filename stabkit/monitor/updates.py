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


class _Entries:
    """Evenly spaced entries of tensors, as views where they are plain.

    Args:
        tensors: parameters.
        index: the block of each, by its ``id``.
        plain: whether they are ordinary tensors of one kind.
    """

    def __init__(self, tensors: list[Tensor], index: dict[int, int], *, plain: bool) -> None:
        self.tensors = tensors
        self.owners = [index[id(p)] for p in tensors]
        self._views = _entries(tensors) if plain and tensors and all(p.is_contiguous() for p in tensors) else None
        self._places = [p.data_ptr() for p in tensors] if self._views else []
        some = _entries(tensors) if self._views is None else self._views
        counts = [entries.numel() for entries in some]
        sizes = [local(p).numel() / copies(p) for p in tensors]
        self.factors = [(size / max(count, 1)) ** 0.5 for size, count in zip(sizes, counts, strict=True)]
        self._lengths = torch.tensor(counts, device=some[0].device) if some else None

    def are_of(self, tensors: list[Tensor]) -> bool:
        """Whether they are of these, and lie where these lie."""
        if len(tensors) != len(self.tensors) or not all(a is b for a, b in zip(tensors, self.tensors, strict=True)):
            return False
        return self._views is None or [p.data_ptr() for p in tensors] == self._places

    def copied(self) -> list[Tensor]:
        """Copies as they are now: of each tensor, or all of plain ones in one."""
        if self._views is None:
            return [entries.clone() for entries in _entries(self.tensors)]
        return [torch.cat(self._views)]

    def norms(self, samples: list[Tensor]) -> list[Tensor]:
        """The norm of the entries of each tensor."""
        if self._views is None:
            return norms_of(samples)
        return list(torch.segment_reduce(samples[0].square(), "sum", lengths=self._lengths).sqrt().unbind())


class UpdateSampler:
    """Watches optimizers by up to 256 evenly spaced entries of each parameter, during one training step.

    Hooks of the optimizers, on only between `on` and `off`, run before and after their step.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Parameters, failed: Callable[[Exception], None]
    ) -> None:
        self._optimizers = list(optimizers)
        self._index = {id(p): i for p, i in zip(parameters.tensors, parameters.owners.tolist(), strict=True)}
        self._failed, self._plain = failed, parameters.plain
        self._entries: dict[int, _Entries] = {}  # by optimizer
        self._undo: list[Callable[[], None]] = []
        self._before: dict[int, list[Tensor]] = {}
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
            with torch.no_grad():
                entries = self._entries.get(id(optimizer))
                if entries is None or not entries.are_of(tensors):
                    entries = self._entries[id(optimizer)] = _Entries(tensors, self._index, plain=self._plain)
                self._before[id(optimizer)] = entries.copied()
        except Exception as error:  # an error here would end the training
            self._failed(error)

    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or id(optimizer) not in self._before:
            return
        try:
            before, entries = self._before.pop(id(optimizer)), self._entries[id(optimizer)]
            if not entries.are_of(entries.tensors):  # an optimizer that puts new tensors in their place
                self._plain = False
            elif entries.tensors:
                self._compare(entries, before)
        except Exception as error:
            self._failed(error)

    @torch.no_grad()
    def _compare(self, entries: _Entries, before: list[Tensor]) -> None:
        after = entries.copied()
        torch._foreach_sub_(before, after)
        if self._found is None:
            self._found = Updates([], [], [], [])
        self._found.owners += entries.owners
        self._found.factors += entries.factors
        self._found.changes += entries.norms(before)
        self._found.after += entries.norms(after)


def _entries(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of evenly spaced entries of each tensor, of those that this rank holds."""
    flat = [local(t).reshape(-1) for t in tensors]
    return [entries[:: max(1, entries.numel() // SAMPLED)] for entries in flat]
