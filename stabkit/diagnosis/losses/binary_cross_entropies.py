"""Binary cross entropies of logits, and the least that they can be where the logits are held in a range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from stabkit.diagnosis.losses.ranges import Range
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.training_pass import nodes_above

_NONE, _SUM = 0, 2  # reductions, of 0 to 2; none leaves every entry to be masked
_SURE = 50.0  # a logit that costs nothing where it is right


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """A binary cross entropy within a loss: ones * softplus(-logit) + zeros * softplus(logit), over all entries.

    Attributes:
        node: what made its logits.
        ones: what each entry has of the class 1: its target, times its weight and that of positives.
        zeros: what it has of the class 0.
        count: what the sum over entries is divided by.
        whole: whether it is averaged or summed over all entries, and not left apart to be masked.
    """

    node: Node | None
    ones: Tensor
    zeros: Tensor
    count: int = 1
    whole: bool = True

    @property
    def chance(self) -> float:
        """What it costs to predict the same for all, at the best."""
        # of one class alone it is as good as nothing, and yet more than the floor of an unbounded range
        logit = (self.ones.sum().log() - self.zeros.sum().log()).clamp(-_SURE / 2, _SURE / 2)
        return self._cost(logit.expand_as(self.ones))

    def floor(self, held: Range) -> float:
        """The least that it can be with logits in a range."""
        best = (self.ones.log() - self.zeros.log()).nan_to_num(0.0, _SURE, -_SURE)  # of what has no weight, any
        return self._cost(best.clamp(held.low, held.high).clamp(-_SURE, _SURE))

    @property
    def undecided(self) -> float:
        """What it costs to leave all logits at zero."""
        return self._cost(torch.zeros_like(self.ones))

    def _cost(self, logits: Tensor) -> float:
        entries = self.ones * functional.softplus(-logits) + self.zeros * functional.softplus(logits)
        return float(entries.sum()) / self.count


def binary_cross_entropies(loss: Tensor) -> Iterator[BinaryCrossEntropy]:
    """Every binary cross entropy of logits behind a loss that is averaged or summed over all its entries."""
    for node in nodes_above(loss):
        found = binary_cross_entropy(node)
        if found is not None and found.whole:
            yield found


def binary_cross_entropy(made: Node) -> BinaryCrossEntropy | None:
    """What a node computes, where it is a binary cross entropy of logits whose entries have weights above zero."""
    node: Any = made
    if operation(node) != "BinaryCrossEntropyWithLogits":
        return None
    targets = node._saved_target.detach().double().clamp(0, 1)
    weight, of_ones = (
        given.detach().double() if isinstance(given, Tensor) else targets.new_ones(())
        for given in (node._saved_weight, node._saved_pos_weight)
    )
    ones, zeros = weight * of_ones * targets, weight * (1 - targets)
    total = float((ones + zeros).sum())
    if not (math.isfinite(total) and total > 0 and bool((ones >= 0).all()) and bool((zeros >= 0).all())):
        return None
    count = 1 if node._saved_reduction == _SUM else ones.numel()
    return BinaryCrossEntropy(node.next_functions[0][0], ones, zeros, count, node._saved_reduction != _NONE)
