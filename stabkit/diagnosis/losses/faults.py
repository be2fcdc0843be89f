"""The loss as a step of its own: not finite, without gradient, or taken of what it does not expect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.losses.closed_over import broken_targets
from stabkit.diagnosis.losses.domains import breaking
from stabkit.diagnosis.losses.flat import flat_loss_findings
from stabkit.diagnosis.losses.same_arguments import same_argument_findings
from stabkit.diagnosis.non_finite.origin import Origin, origin_of
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.tracing import Flow
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.graph.values import Value, operation, value_of
from stabkit.tracing.products.node_derivatives import signed
from stabkit.vocabulary import moves

#: module path of findings on the loss, which belongs to no module
# operations that leave numbers what they are
_STRUCTURAL = moves("reshape", "permute", "copy", "select", "gather")
_PROBABILITIES = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
# what a loss computes first, and what it expects there
_ON_LOGITS = {"LogSoftmax": "cross_entropy", "BinaryCrossEntropyWithLogits": "binary_cross_entropy_with_logits"}
_ON_LOGARITHMS = {"NllLoss": "nll_loss", "NllLoss2D": "nll_loss"}
_NORMALISED = 0.05  # by how much probabilities may miss a sum of 1: float16 loses that in a thousand classes
_FLAT = 0.05  # of the largest derivative of a sigmoid
_HIDDEN = 0.15  # share of the fall of a loss that its gradient promises, under which a sigmoid hides that fall
_REFERENCE = "Goodfellow, Bengio and Courville, Deep learning, 2016, section 6.2"
_GOODFELLOW = "Goodfellow et al., Generative adversarial nets, 2014, section 3"


def loss_findings(flow: Flow, loss: Any, thresholds: Thresholds) -> list[Finding]:
    """What is wrong with the loss itself; empty where there is none.

    Raises:
        TraceError: the loss is not a differentiable scalar of the output.
    """
    if loss is None:
        return []
    scalar = scalar_loss(loss, flow.output)
    if not bool(scalar.detach().isfinite()):
        origin = origin_of(flow.forward_pass, loss)
        if origin is None or origin.part != "loss":
            return []  # who measures the whole says what is at fault: see `finite_end`
        return [_not_finite(flow, loss, origin)]
    mismatch = _mismatch(flow, scalar) or _no_logarithms(flow, scalar)
    found = [*mismatch, *same_argument_findings(flow, loss), *_flat_sigmoid(flow, loss, scalar, thresholds)]
    return found or flat_loss_findings(flow, loss, scalar)


def _not_finite(flow: Flow, loss: Any, origin: Origin) -> Finding:
    evidence = f"the output is finite and the loss is not: it begins at {origin.place}: {origin.cause.text}"
    remedy = origin.cause.remedy
    if origin.cause.given:
        where, mend = broken_targets(loss)
        evidence, remedy = evidence + f": {where}" * bool(where), mend or remedy
    wrong = breaking(loss, flow.output, flow.forward_pass.seed, origin.line)
    if wrong is not None:
        evidence, remedy = f"{evidence}; {wrong.evidence}", wrong.remedy
    return of_last_step(flow, "non_finite", "critical", LOSS, evidence, remedy, _REFERENCE, dict(origin.cause.numbers))


def _mismatch(flow: Flow, scalar: Tensor) -> list[Finding]:
    """A loss on logits or on logarithms that is given probabilities."""
    made = _maker(flow.states[-1].values[0])
    kind = _PROBABILITIES.get(operation(made.node)) if made is not None else None
    if made is None or kind is None:
        return []
    for node, taken in _loss_nodes(flow, scalar):
        source = _maker(taken)
        name = operation(node)
        if source is None or source.node is not made.node or name not in _ON_LOGITS | _ON_LOGARITHMS:
            continue
        path = flow.recorded.path_of(made.node)
        classes = int(made.node._input_metadata[0].shape[-1])
        if name in _ON_LOGARITHMS:
            function, wanted, remedy = _ON_LOGARITHMS[name], "log-probabilities", "take log_softmax in its place"
            floor = "it is minus a probability, no logarithm of one"
        else:
            function, wanted = _ON_LOGITS[name], "logits"
            remedy = f"give it what goes into the {kind}: take the {kind} out of the model while training"
            floor = f"it cannot fall below {_least(name, classes):.3g}, since probabilities lie within 0 to 1"
        evidence = f"{function} expects {wanted} and is given the output of a {kind} ({path or 'the model'}): {floor}"
        numbers = {"loss": float(scalar.detach()), "classes": float(classes)}
        return [of_last_step(flow, "loss", "warning", LOSS, evidence, remedy, _REFERENCE, numbers)]
    return []


def _no_logarithms(flow: Flow, scalar: Tensor) -> list[Finding]:
    """A negative log-likelihood of what are no logarithms of probabilities: it falls without end."""
    for node, _ in _loss_nodes(flow, scalar):
        taken = getattr(node, "_saved_self", None)
        if operation(node) not in _ON_LOGARITHMS or not isinstance(taken, Tensor) or taken.dim() < 2:
            continue
        sums = taken.detach().double().logsumexp(1).exp()
        if other := _along_another_axis(node, taken, sums):
            return [of_last_step(flow, "loss", "warning", LOSS, *other, _REFERENCE, {"softmax_axis": 1.0})]
        off = (sums - 1).abs() > _NORMALISED
        above = sums > 1 + _NORMALISED  # probabilities that sum to less than 1 leave the loss bounded
        if not bool(sums.isfinite().all()) or float(off.double().mean()) < 0.5 or not bool(above.any()):
            continue
        name = _ON_LOGARITHMS[operation(node)]
        evidence = (
            f"{name} expects log-probabilities, and what it is given sums to {float(sums.median()):.3g} and not to 1 "
            "as probabilities: such a loss has no least value and falls as long as the outputs grow"
        )
        numbers = {"loss": float(scalar.detach()), "sum": float(sums.median())}
        remedy = "take log_softmax of the logits first, or cross_entropy in place of both"
        return [of_last_step(flow, "loss", "warning", LOSS, evidence, remedy, _REFERENCE, numbers)]
    return []


def _along_another_axis(node: Any, taken: Tensor, sums: Tensor) -> tuple[str, str] | None:
    """Evidence and remedy where log-probabilities were made to sum to 1 along an axis that holds no classes.

    Similarities of as many as there are of the other may be taken along either axis: each is to find its own.
    """
    if float(((sums - 1).abs() > _NORMALISED).double().mean()) < 0.5 or taken.shape[0] == taken.shape[1]:
        return None
    parent, number = node.next_functions[0]
    made = _maker(Value(parent, number)) if parent is not None else None
    while made is not None and operation(made.node) in ("Log", "Add"):  # of a softmax, and a small number to it
        parent, number = made.node.next_functions[0]
        made = _maker(Value(parent, number)) if parent is not None else None
    if made is None or operation(made.node) not in ("LogSoftmax", "Softmax"):
        return None
    shape, axis = tuple(made.node._input_metadata[0].shape), signed([getattr(made.node, "_saved_dim", -1)])[0]
    classes = [place for place, size in enumerate(shape) if size == taken.shape[1] and place != axis % len(shape)]
    if not classes:
        return None  # some of the classes were left out
    evidence = (
        f"nll_loss expects log-probabilities that sum to 1 over the {taken.shape[1]} classes, and is given those of a "
        f"softmax along axis {axis % len(shape)} of {shape}, which holds none: over classes they sum to "
        f"{float(sums.median()):.3g}, and what one sample or position gains another loses"
    )
    return (
        evidence,
        f"dim={(classes or [len(shape) - 1])[-1] - len(shape)} in that softmax, or cross_entropy of the scores",
    )


def _least(name: str, classes: int) -> float:
    """The least value of a loss on logits when the logits lie within 0 to 1."""
    return math.log1p((classes - 1) / math.e) if name == "LogSoftmax" else math.log1p(math.exp(-1.0))


def _flat_sigmoid(flow: Flow, loss: Any, scalar: Tensor, thresholds: Thresholds) -> list[Finding]:
    """A sigmoid before the loss that is flat: a fault where it is wrong, and no more than a fact where it is right.

    So the outputs are turned round, p to 1 - p: where the loss falls by that and yet hardly depends on the logits, the
    sigmoid hides the error from the gradient. A logarithm of p takes the sigmoid out again, so that nothing is hidden.
    """
    made = _maker(flow.states[-1].values[0])
    if made is None or operation(made.node) != "Sigmoid" or not isinstance(flow.output, Tensor):
        return []
    output = flow.output.detach()
    flat = (4 * output * (1 - output) < _FLAT).double().mean()
    if float(flat) < thresholds.saturated:
        return []
    parent, number = made.node.next_functions[0]
    assert parent is not None
    (pulled,) = torch.autograd.grad(scalar, [GradientEdge(parent, number)], retain_graph=True)
    logits = torch.special.logit(output.double(), eps=1e-7).reshape(pulled.shape)
    slope = 2 * float((pulled.detach().double() * logits).abs().sum())  # what the gradient promises on the way there
    with torch.no_grad():
        turned = float(loss(1 - output))
    value = float(scalar.detach())
    fall = value - turned
    path = flow.recorded.path_of(made.node)
    if not math.isfinite(turned) or abs(fall) <= 0.5 * max(abs(value), abs(turned)):
        return []
    if fall < 0:
        evidence = (
            f"{float(flat):.0%} of the outputs of the sigmoid {path or 'before the loss'} lie where it is flat, and "
            f"right: turned round, 1 - p, they would take the loss from {value:.3g} to {turned:.3g}"
        )
        numbers = {"saturated": float(flat), "loss": value, "turned": turned}
        return [of_last_step(flow, "saturated", "info", path, evidence, "none is needed", _GOODFELLOW, numbers)]
    if slope >= _HIDDEN * fall:
        evidence = (
            f"{float(flat):.0%} of the outputs of the sigmoid {path or 'before the loss'} lie where it is flat, and "
            f"wrong, and its loss makes up for that: turned round, 1 - p, they would bring it from {value:.3g} to "
            f"{turned:.3g}, and its gradient by the logits promises {slope / fall:.0%} of that"
        )
        numbers = {"saturated": float(flat), "promised": slope / fall, "loss": value, "turned": turned}
        return [of_last_step(flow, "saturated", "info", path, evidence, "none is needed", _GOODFELLOW, numbers)]
    evidence = (
        f"{float(flat):.0%} of the outputs of the sigmoid {path or 'before the loss'} lie where it is flat, and wrong: "
        f"turned round, 1 - p, they would bring the loss from {value:.3g} to {turned:.3g}, and its gradient by the "
        f"logits promises {slope / fall:.1%} of that"
    )
    remedy = (
        "take the sigmoid into the loss: binary_cross_entropy_with_logits on its input; for a generator minimise "
        "-log D(G(z)), which does not saturate"
    )
    numbers = {
        "saturated": float(flat),
        "promised": slope / fall,
        "loss": value,
        "turned": turned,
        "closed:sigmoid": 1.0,
    }
    return [of_last_step(flow, "saturated", "warning", path, evidence, remedy, _GOODFELLOW, numbers)]


def _loss_nodes(flow: Flow, scalar: Tensor) -> Iterator[tuple[Node, Value]]:
    """Nodes of the loss with each of their inputs, down to the output of the flow."""
    ends = {value.node for value in flow.states[-1].values}
    seen: set[Node] = set()
    stack = [value_of(scalar).node]
    while stack:
        node = stack.pop()
        if node in seen or node in ends:
            continue
        seen.add(node)
        for parent, number in node.next_functions:
            if parent is not None:
                yield node, Value(parent, number)
                stack.append(parent)


def _maker(value: Value) -> Value | None:
    """The operation behind a value that is not only a view or a copy."""
    while operation(value.node) in _STRUCTURAL:
        parents = [Value(parent, number) for parent, number in value.node.next_functions if parent is not None]
        if len(parents) != 1:
            return None
        value = parents[0]
    return value
