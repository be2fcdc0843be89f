"""Modules and parameters that every call makes anew: they get a gradient, and the next call throws them away.

A layer that is made inside of the forward pass is no parameter of a model that an optimizer was made for. The model is
called twice in a row: what the first call alone makes is built lazily, and stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_last_step
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.made_parameters import on_graph, parameters_made
from stabkit.tracing.recording.training_pass import calling_line, nodes_above

_REFERENCE = "PyTorch documentation, torch.nn.Module: submodules are assigned in __init__"


def made_anew_findings(run: TrainingRun) -> list[Finding]:
    """One finding for all parameters that are made inside of the forward pass and get a gradient."""
    assert run.done.loss is not None
    kept = {id(p) for p in run.call.module.parameters()}
    leaves = [node.variable for node in nodes_above(run.done.loss) if hasattr(node, "variable")]
    if all(id(leaf) in kept or not isinstance(leaf, nn.Parameter) for leaf in leaves):
        return []
    first, second = _called_twice(run.call, run.loss)
    again = second or first
    if not again:
        return []
    entries = sum(p.numel() for p, _, _ in again)
    share = entries / (entries + sum(p.numel() for p in run.call.module.parameters() if p.requires_grad))
    names = tuple(dict.fromkeys(name for _, name, _ in again if name))
    lines = tuple(dict.fromkeys(line for _, _, line in again if line))
    what = f"{len(again)} parameters" + (f" ({listed(names)})" if names else "")
    where = f"; made at {listed(lines)}" if lines else ""
    if second:
        evidence = (
            f"{what} that get a gradient are made anew by every call of the model, {share:.0%} of the numbers that are "
            f"to be trained: no optimizer holds them, and the next call throws away what they might have learnt{where}"
        )
        remedy = "make these modules or parameters once, in __init__, and only call them in forward"
    else:
        evidence = (
            f"{what} that get a gradient are made by the first call of the model, {share:.0%} of the numbers that are "
            f"to be trained: an optimizer that is made before that call does not hold them{where}"
        )
        remedy = "call the model once before the optimizer is made, or make them in __init__"
    return [
        of_last_step(
            run.flow,
            "unregistered",
            "warning" if second else "info",
            names[0].rpartition(".")[0] if names else "",
            evidence=evidence,
            remedy=remedy,
            reference=_REFERENCE,
            numbers={"parameters": float(len(again)), "share": share},
        )
    ]


_Made = tuple[nn.Parameter, str, str]


def _called_twice(call: ForwardPass, loss: Any) -> tuple[list[_Made], list[_Made]]:
    """Parameters that get a gradient and were made by the first of two calls, and those made by the second.

    Copies of parameters that the model has, as an inner loop of training makes, and what is made of a tensor with a
    history are left out: those are another thing.
    """
    found = []
    with call.kept(loss), torch.enable_grad():
        for _ in range(2):
            held = [p.detach() for p in call.module.parameters()]
            made: list[tuple[nn.Parameter, str]] = []

            def seen(data: Tensor | None, parameter: nn.Parameter, made: Any = made) -> None:
                if parameter.requires_grad and not on_graph(data):
                    made.append((parameter, calling_line()))

            with parameters_made(seen):
                scalar = scalar_loss(loss, call.called())
            made = [(p, line) for p, line in made if not _copies(p, held)]
            names = {id(p): path for path, p in call.module.named_parameters()}
            grads = torch.autograd.grad(scalar, [p for p, _ in made], allow_unused=True) if made else ()
            moved = zip(made, grads, strict=True)
            found.append([(p, names.get(id(p), ""), line) for (p, line), g in moved if g is not None and bool(g.any())])
    return found[0], found[1]


def _copies(parameter: Tensor, held: list[Tensor]) -> bool:
    """Whether the numbers of a parameter are those of one that there was before, and not a constant."""
    data = parameter.detach()
    if data.numel() < 2 or bool((data == data.reshape(-1)[0]).all()):
        return False
    return any(data.shape == each.shape and torch.equal(data, each) for each in held)
