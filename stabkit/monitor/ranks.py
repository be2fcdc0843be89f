"""Norms of the whole batch and the whole model when both are spread over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stabkit.monitor.collection import CLIPPED, GRADIENT, LOSS, OF_BATCH, Sums
from stabkit.monitor.parameters import is_sharded


@dataclass(frozen=True)
class Agreement:
    """What processes that train together must know of each other to go on alike.

    Attributes:
        stopped: whether the monitor of any of them has failed, so that all go quiet.
        requested: whether any of them wants a capsule.
    """

    stopped: bool
    requested: bool


class TrainingRanks:
    """The processes that train one model together; does nothing when there is one.

    Under ``DistributedDataParallel`` and ``fully_shard`` every process has its own part of the batch and a loss that is
    the mean over that part; gradients are averaged. The gradient of the whole batch's mean loss with respect to an
    output is then the local one divided by the number of processes, and squares add up over processes.

    Every process takes part in every record by one collective operation, also when its own monitor has failed: it says
    so there, and all stop. What follows is decided from the sums, which are the same everywhere.

    Args:
        model: as it is called.
        parameters: the parameters of the model.
        distributed: whether the processes train one model; None asks the wrapper.

    Attributes:
        count: how many there are.
        sharded: whether every process holds only a part of the parameters.
        first: whether this process is the one that writes.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], distributed: bool | None = None) -> None:
        running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.sharded = running and is_sharded(parameters)
        self.count, self.first = 1, True
        self._groups: list[Any] = []
        if self.sharded:
            mesh: Any = next(p.device_mesh for p in parameters if hasattr(p, "device_mesh"))
            self._groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
            self.count = mesh.size()
            self.first = not any(mesh.get_coordinate() or ())
        elif running and (distributed or (distributed is None and _replicated(model))):
            group: Any = model.process_group if _replicated(model) else dist.group.WORLD
            self._groups, self.count = [group], dist.get_world_size(group)
            self.first = dist.get_rank(group) == 0
        self._device = next((p.device for p in parameters), torch.device("cpu"))

    @property
    def together(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def reduce(self, sums: Sums | None, shape: tuple[int, int], requested: bool) -> Agreement:
        """Replace the sums of this process by those of all, by one collective operation in every group.

        Args:
            sums: those of this process; None when its monitor has failed.
            shape: the shape of ``sums.rows``.
            requested: whether a capsule was asked for here.
        """
        if not self.together:
            return Agreement(sums is None, requested)
        rows = np.zeros(shape) if sums is None else sums.rows
        single = [0.0, math.nan] if sums is None else [float(sums.scalars[LOSS]), float(sums.scalars[CLIPPED])]
        flat = np.concatenate([rows.reshape(-1), single, [sums is None, requested]])
        shared = torch.from_numpy(flat).to(self._device)
        for group in self._groups:
            dist.all_reduce(shared, group=group)
        whole = shared.cpu().numpy()
        if sums is not None:
            self._take(sums, whole[:-4].reshape(shape), whole[-4:-2])
        return Agreement(bool(whole[-2] > 0), bool(whole[-1] > 0))

    def _take(self, sums: Sums, rows: Any, single: Any) -> None:
        if self.sharded:
            sums.rows = rows
            sums.scalars[CLIPPED] = single[1]
        else:
            sums.rows[OF_BATCH] = rows[OF_BATCH]
        sums.rows[GRADIENT] /= self.count**2
        sums.scalars[LOSS] = single[0] / self.count

    def agreed(self, squares: float, *signs: bool) -> tuple[float, list[bool]]:
        """The squared norm of the whole gradient, and which of some signs any process has. A collective operation.

        Args:
            squares: of the gradients that this process holds.
            *signs: what is seen here.
        """
        if not self.together:
            return squares, list(signs)
        shared = torch.tensor([squares, *map(float, signs)], dtype=torch.float64, device=self._device)
        for group in self._groups:
            dist.all_reduce(shared, group=group)
        total, *counts = shared.tolist()
        return (total if self.sharded else total / self.count), [count > 0 for count in counts]

    def gather(self, item: Any) -> list[Any]:
        """The item of every process, at the first; this one's own elsewhere. A collective operation."""
        if not self.together:
            return [item]
        found = [item]
        for group in self._groups:
            listed: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(listed, found, group=group)
            found = [one for some in listed for one in some]
        return found

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of the whole model; a collective operation when the model is sharded."""
        if not self.sharded:
            return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options)
        return {name: value.detach() for name, value in whole.items() if isinstance(value, Tensor)}


def _replicated(model: nn.Module) -> bool:
    """Whether a model is wrapped by ``DistributedDataParallel``, compiled or not."""
    return isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel)
