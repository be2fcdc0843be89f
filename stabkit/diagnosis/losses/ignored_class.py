"""A cross entropy that leaves out a class which samples have: its index is that of the labels to be ignored.

Of tokens the padding is left out so, on purpose. Where every sample has one label, and no input is of tokens, the class
is never learnt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.node_derivatives import signed
from stabkit.tracing.recording.training_pass import nodes_above

_SHARE = 0.02  # of the labels: fewer may stand for samples without one
_REFERENCE = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html"


def ignored_class_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a class of the outputs is the one that a cross entropy ignores."""
    if run.done.loss is None or any(not t.is_floating_point() for _, t in run.call.given):
        return []
    samples = next((len(t) for _, t in run.call.given if t.dim() > 0), 0)
    for each in nodes_above(run.done.loss):
        node: Any = each
        if operation(node) != "NllLoss" or not isinstance(labels := node._saved_target, Tensor):
            continue
        (ignored,), taken = signed([node._saved_ignore_index]), node._saved_self
        if labels.dim() != 1 or len(labels) != samples or not 0 <= ignored < taken.shape[1]:
            continue
        count = int((labels == ignored).sum())
        others = torch.unique(labels[labels != ignored])
        if count <= _SHARE * samples or len(others) < 2:
            continue
        evidence = (
            f"{count} of {samples} labels are {ignored}, which is the ignore_index of the cross entropy: these samples "
            f"count for nothing, and none is left that teaches class {ignored} of {taken.shape[1]}"
        )
        remedy = f"leave ignore_index at -100, or give it a number that is no class, where class {ignored} is one"
        return [
            of_last_step(run.flow, "loss", "warning", LOSS, evidence, remedy, _REFERENCE, {"ignored": float(count)})
        ]
    return []
