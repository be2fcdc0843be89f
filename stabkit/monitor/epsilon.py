"""Adam's epsilon beside the gradients that it is added to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.monitor.parameters import Parameters, local
from stabkit.monitor.record import Array

_SAMPLED = 256  # entries of a tensor
_OWN = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")  # mean squares of gradients, by their names in an optimizer


class EpsilonShares:
    """Which part of the entries of every block has gradients that are smaller than epsilon.

    Where the root of the mean square of a gradient is below epsilon, an optimizer that divides by their sum moves the
    entry by less than half of its rate. Entries whose gradient has been zero throughout do not count: nothing moves
    them, whatever is added.

    Args:
        optimizers: those of torch that keep such a mean are looked at (Adam, AdamW, NAdam, RAdam, RMSprop).
        parameters: by block.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], parameters: Parameters) -> None:
        self._optimizers = [one for one in optimizers if all("eps" in group for group in one.param_groups)]
        self._owners = {id(p): i for p, i in zip(parameters.tensors, parameters.owners.tolist(), strict=True)}

    def measured(self, count: int) -> tuple[Array, float, float]:
        """The share by block, NaN where it is not known, the largest epsilon, and the median of such roots below it.

        Args:
            count: number of blocks; what belongs to none comes last and is left out.
        """
        samples: list[Tensor] = []
        limits: list[float] = []
        owners: list[int] = []
        largest = 0.0
        for one in self._optimizers:
            for group in one.param_groups:
                eps = float(group["eps"])
                for parameter in group["params"]:
                    state = one.state.get(parameter, {})
                    mean = next((state[name] for name in _OWN if name in state), None)
                    if mean is None or id(parameter) not in self._owners:
                        continue
                    entries = local(mean).reshape(-1)
                    samples.append(entries[:: max(1, len(entries) // _SAMPLED)])
                    limits.append(eps**2 * _correction(one, group, state))
                    owners.append(self._owners[id(parameter)])
                    largest = max(largest, eps)
        if not samples:
            return np.full(count, math.nan), math.nan, math.nan
        values = torch.cat([sample.detach().double().cpu() for sample in samples]).numpy()
        sizes = [len(sample) for sample in samples]
        block, limit = np.repeat(owners, sizes), np.repeat(limits, sizes)
        below = (values > 0) & (values < limit)
        moved = np.bincount(block, values > 0, count + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.bincount(block, below, count + 1) / moved
            roots = np.sqrt(values[below] / limit[below])
        return shares[:count], largest, float(np.median(roots)) * largest if len(roots) else math.nan


def _correction(optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]) -> float:
    """What the mean square is divided by before its root is taken."""
    if isinstance(optimizer, torch.optim.RAdam) or "betas" not in group:
        return 1.0
    made = max(float(state.get("step", 1)), 1.0)
    return 1.0 - math.pow(float(group["betas"][1]), made)
