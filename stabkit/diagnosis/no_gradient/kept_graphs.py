"""States that a model keeps between calls with the graph that made them: the second training step cannot go back.

A recurrent model that starts where it stopped holds its last state in an attribute. With its graph, the next loss
leads back through the step before, whose graph is freed. Two steps are made on one and the same model, and two more
with what it keeps taken off its graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_last_step
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.inputs import prepare
from stabkit.tracing.recording.training_pass import nodes_above
from stabkit.tracing.recording.transparency import transparent

_FREED = "a second time"  # of what autograd says where a graph is freed
_REFERENCE = "PyTorch examples, word_language_model: repackage_hidden"


def kept_graph_findings(flow: Flow, loss: Any, call: ForwardPass) -> list[Finding]:
    """A finding where a second step goes back through the first, by a tensor in an attribute of the model."""
    if not callable(loss) or not any(p.requires_grad for p in call.module.parameters()):
        return []
    with call.kept(loss), torch.enable_grad():
        scalar = loss(_run(call))
        if not _kept(call.module) or not isinstance(scalar, Tensor) or not scalar.requires_grad:
            return []
        held = _fails(call, loss, scalar, detach=False)
        if not held:
            return []
        several = not isinstance(operator.attrgetter(held[0])(call.module), Tensor)
    with call.kept(loss), torch.enable_grad():
        cured = _fails(call, loss, loss(_run(call)), detach=True) is None
    return [_finding(flow, held, several)] if cured else []


def _run(call: ForwardPass) -> Any:
    """The output, of inputs that a model may differentiate with respect to, as in the recorded pass."""
    prepared = prepare(call.inputs, call.kwargs)
    with transparent(call.through_no_grad):
        return call.model(*prepared.args, **prepared.kwargs)


def _kept(model: nn.Module) -> dict[str, tuple[nn.Module, str, list[Tensor]]]:
    """Attributes that hold tensors on a graph, by path."""
    return {path: (owner, name, tensors) for path, owner, name, tensors in _attributes(model)}


def _attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, list[Tensor]]]:
    for path, module in model.named_modules():
        given = {name: held for name, held in vars(module).items() if name not in ("_parameters", "_modules")}
        for name, held in [*given.items(), *given.pop("_buffers", {}).items()]:
            tensors = [t for _, t in named_tensors({name: held}) if t.grad_fn is not None]
            if name != "_buffers" and tensors:
                yield (f"{path}.{name}" if path else name), module, name, tensors


def _fails(call: ForwardPass, loss: Any, scalar: Tensor, *, detach: bool) -> list[str] | None:
    """The attributes by which a second step leads back into the first, whose graph is freed; None where it runs.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        scalar: the first loss, on its graph.
        detach: whether what the model keeps is taken off the graph between the steps.
    """
    weights = [p for p in call.module.parameters() if p.requires_grad]
    torch.autograd.grad(scalar, weights, allow_unused=True)
    kept = _kept(call.module)
    for owner, name, _ in kept.values() if detach else ():
        setattr(owner, name, map_tensors(getattr(owner, name), lambda t: t.detach()))
    again = loss(_run(call))
    try:
        torch.autograd.grad(again, weights, allow_unused=True)
    except RuntimeError as error:
        if _FREED not in str(error):
            return []
        above = nodes_above(again)
        return [path for path, (_, _, tensors) in kept.items() if any(t.grad_fn in above for t in tensors)]
    return None


def _finding(flow: Flow, held: list[str], several: bool) -> Finding:
    first = held[0]
    own = f"self.{first.rpartition('.')[2]}"
    off = f"tuple(h.detach() for h in {own})" if several else f"{own}.detach()"
    return of_last_step(
        flow,
        "kept_graph",
        "critical",
        first,
        evidence=f"{listed(tuple(held))} of the model holds what the call before computed, with its graph, and the "
        "next call goes on from it: tried on a copy, the second backward raises 'Trying to backward through the graph "
        "a second time'; with it detached between the calls two steps run",
        remedy=f"detach what is kept: {own} = {off} at the end of forward, or begin every "
        "call with a fresh state; retain_graph=True only lets the graph grow with every step",
        reference=_REFERENCE,
        numbers={"kept": float(len(held))},
    )
