"""Binary cross entropies of logits, and the least that they can be where the logits are held in a range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.losses.ranges import Range
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.training_pass import nodes_above

_NONE = 0  # the reduction that leaves every entry to be masked


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """A binary cross entropy within a loss.

    Attributes:
        node: what made its logits.
        targets: those that count.
    """

    node: Node | None
    targets: Tensor

    @property
    def chance(self) -> float:
        """What the share of ones costs when it is predicted for all."""
        share = min(max(float(self.targets.double().mean()), 1e-12), 1 - 1e-12)
        return -share * math.log(share) - (1 - share) * math.log1p(-share)

    def floor(self, held: Range) -> float:
        """The least that it can be with logits in a range."""
        y = self.targets.double().clamp(0, 1)
        best = y.logit().clamp(held.low, held.high).clamp(-50, 50)
        return float((best.clamp_min(0) - best * y + (-best.abs()).exp().log1p()).mean())


def binary_cross_entropies(loss: Tensor) -> Iterator[BinaryCrossEntropy]:
    """Every binary cross entropy of logits behind a loss that is averaged or summed over all its entries."""
    for each in nodes_above(loss):
        node: Any = each
        if operation(node) != "BinaryCrossEntropyWithLogits" or node._saved_reduction == _NONE:
            continue
        targets, weight = node._saved_target.detach(), node._saved_weight
        if isinstance(weight, Tensor):
            targets = targets[weight.expand_as(targets) != 0]
        if targets.numel() and bool(targets.isfinite().all()):
            yield BinaryCrossEntropy(node.next_functions[0][0], targets)
