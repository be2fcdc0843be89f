"""What a loss holds against what: outputs and their targets, as the graph of the loss keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above

_REGRESSIONS = ("MseLoss", "SmoothL1Loss", "HuberLoss")
_DIFFERENCES = ("Pow", "Abs", "LinalgVectorNorm", "Cosh")


@dataclass(frozen=True)
class Regression:
    """An output beside its targets.

    Attributes:
        node: what made the output.
        output: the output, of any layout.
        targets: what it is held against, of the same layout.
    """

    node: Node | None
    output: Tensor
    targets: Tensor


def regressions(done: TrainingPass) -> Iterator[Regression]:
    """Every regression that the loss of a training pass is made of."""
    assert done.loss is not None
    outputs: dict[Any, Tensor] = {t.grad_fn: t.detach() for _, t in named_tensors(done.output) if t.grad_fn is not None}
    for each in nodes_above(done.loss):
        node: Any = each
        if operation(node) in _REGRESSIONS and not node._saved_target.requires_grad:
            yield Regression(node.next_functions[0][0], node._saved_self.detach(), node._saved_target.detach())
        elif _of_difference(node) and operation(inner := node.next_functions[0][0]) == "Sub":
            sides = [p if p is None or p in outputs else behind_moves(p) for p, _ in inner.next_functions]
            taken = [side in outputs for side in sides]
            if sum(taken) != 1 or sides[1 - taken.index(True)] is not None:
                continue
            output, difference = outputs[sides[taken.index(True)]], node._saved_self.detach()
            if [n for n in output.shape if n > 1] == [n for n in difference.shape if n > 1]:
                output = output.reshape(difference.shape)
                targets = output - difference if taken[0] else output + difference
                yield Regression(sides[taken.index(True)], output, targets)


def _of_difference(node: Any) -> bool:
    """Whether it makes of a difference something that is the same of its negative."""
    if operation(node) == "Mul":
        factors = node.next_functions
        return len(factors) == 2 and factors[0] == factors[1] and factors[0][0] is not None
    return operation(node) in _DIFFERENCES
