"""The weights that logits are made of, by a few entries each at every training step: when to look at the logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stabkit.monitor.losses import LossReader

# Entries of a parameter, and parameters.
_ENTRIES, _MOST = 16, 64
_VISITED = 64  # nodes behind a tensor among which its parameters are looked for
# In one step. An update that turns weights by a tenth of their norm makes them longer by half a hundredth; that much
# is a rate that is far too large, or no update at all. It starts a look, and no alert.
_LONGER = 1.1
_LEAST = 1e-30


class LogitWeights:
    """Sees weights behind a softmax that become longer at once, so that no look has to be taken at every step.

    Args:
        parameters: of the model; what is none of them, such as gathered shards, is not watched.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._known = {id(p) for p in parameters}
        self._watched: list[Tensor] = []
        self._groups: list[int] = []  # which of them are behind one softmax
        self._places: list[int] = []  # where their numbers lie
        self._entries: list[Tensor] = []  # some of each, as views
        self._arrays: list[Any] = []  # the same where they lie on the host
        self._shares: list[float] = []  # how many each of them stands for
        self._sums = torch.zeros(0)  # of their squares, to those of groups
        self._sizes: Any = None
        self._reader = LossReader()

    def watch(self, groups: Iterable[Iterable[Tensor]]) -> None:
        """Watch the parameters of the model among groups of tensors, each group by its size as a whole.

        Nothing is done where all are watched already, or none is found.
        """
        found: dict[int, tuple[int, Tensor]] = {}
        for number, group in enumerate(groups):
            for each in group:
                if id(each) in self._known and id(each) not in found and _is_dense(each) and len(found) < _MOST:
                    _, first = next(iter(found.values()), (0, each))
                    if (each.dtype, each.device) == (first.dtype, first.device):
                        found[id(each)] = number, each
        if found and found.keys() != {id(each) for each in self._watched}:
            self._watched, self._places = [each for _, each in found.values()], []
            order = {number: place for place, number in enumerate(dict.fromkeys(n for n, _ in found.values()))}
            self._groups = [order[number] for number, _ in found.values()]

    def grew(self, step: int) -> bool:
        """Whether any group has become longer by a tenth at once; of those on a device it is known a step late.

        Args:
            step: the training step.
        """
        if not self._watched:
            return False
        places = [p.data_ptr() for p in self._watched]
        if places != self._places:  # also where a model has been moved
            self._places, self._sizes = places, None
            self._take_views()
        before, self._sizes = self._sizes, self._measured()
        if before is None:
            return False
        if isinstance(before, list):
            return any(now > _LONGER**2 * size + _LEAST for now, size in zip(self._sizes, before, strict=True))
        ratio = (self._sizes / before.clamp_min(_LEAST)).amax()
        return any(value > _LONGER**2 for _, value in self._reader.take(step, ratio))

    def _take_views(self) -> None:
        flat = [p.detach().view(-1) for p in self._watched]
        self._entries = [entries[:: max(1, -(-len(entries) // _ENTRIES))] for entries in flat]
        self._shares = [len(entries) / len(few) for entries, few in zip(flat, self._entries, strict=True)]
        on_host = flat[0].device.type == "cpu" and flat[0].dtype in (torch.float32, torch.float64)
        self._arrays = [few.numpy() for few in self._entries] if on_host else []
        counts = torch.tensor([len(few) for few in self._entries])
        sums = torch.zeros(max(self._groups) + 1, int(counts.sum()))
        owners = torch.repeat_interleave(torch.tensor(self._groups), counts)
        sums[owners, torch.arange(sums.shape[1])] = torch.repeat_interleave(torch.tensor(self._shares), counts)
        self._sums = sums.to(flat[0].device)

    def _measured(self) -> Any:
        """The squares of the sizes of all groups; on the host as plain numbers, for a third of the price of arrays."""
        if not self._arrays:
            with torch.no_grad():
                return self._sums @ torch.cat(self._entries).float().square()
        sizes = [0.0] * len(self._sums)
        for group, share, array in zip(self._groups, self._shares, self._arrays, strict=True):
            sizes[group] += share * sum([x * x for x in array.tolist()])
        return sizes


def makers(tensor: Tensor, count: int) -> list[Tensor]:
    """The parameters that a tensor was made of last: those nearest behind it in its graph, ``count`` at most."""
    found: list[Tensor] = []
    waiting: deque[Any] = deque([tensor.grad_fn])
    seen = set()
    for _ in range(_VISITED):
        if not waiting or len(found) >= count:
            break
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        waiting.extend(behind for behind, _ in node.next_functions)
    return found


def _is_dense(tensor: Tensor) -> bool:
    whole = not (tensor.is_meta or hasattr(tensor, "to_local"))  # a part of one says little of the whole
    return whole and tensor.is_floating_point() and tensor.numel() > 0 and tensor.is_contiguous()
