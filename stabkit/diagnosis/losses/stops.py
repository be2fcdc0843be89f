"""Where a loss ends its gradient: the operation at which one arrives and none leaves, by name, with a remedy for it.

An operation may leave the graph (``argmax``, a comparison, ``detach``), have no slope anywhere (``round``), be given
nothing within its bounds (``clamp``, ``relu``), take another branch (``where``), or be flat to rounding (``sigmoid``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.no_gradient.lost_parameters import remedy_for
from stabkit.errors import StabkitError
from stabkit.tracing.derivatives.lost_gradient import INDICES, Exits
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.inputs import differentiable
from stabkit.tracing.recording.randomness import unchanged_randomness
from stabkit.tracing.recording.training_pass import calling_place, nodes_above, nodes_from, training_pass
from stabkit.vocabulary import activation_of

_NO_SLOPE = frozenset({"Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside"})
_BRANCHES = frozenset({"Where", "MaskedFill", "MaskedFill_"})
_ON_LOGITS = {
    "Sigmoid": "binary_cross_entropy_with_logits, or -logsigmoid, of what goes into the sigmoid",
    "Softmax": "cross_entropy of the scores that go into the softmax",
}
_CHOICES = ("argmax", "argmin", "max", "topk", "sort", "eq", "ne")  # what reads the best class off scores
_THRESHOLDS = ("gt", "ge", "lt", "le")
_GIVEN = ("item()", "numpy()", "tolist()")


@dataclass(frozen=True)
class Stop:
    """Where a loss ends its gradient.

    Attributes:
        words: the operation with its place, and why nothing leaves it.
        remedy: what to do.
        boxes: whether it holds the overlap of boxes.
    """

    words: str
    remedy: str
    boxes: bool = False


class _Lines(FunctionCalls):
    """Which function, where and on what, made every node."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[Node, tuple[str, str, Any]] = {}

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.grad_fn is not None:
            self.of[out.grad_fn] = (name_of(func), calling_place(), args[0] if args else None)
        return out


def flat_stop(loss: Any, output: Any, rows: Tensor | None = None) -> Stop | None:
    """The operation of a loss that a gradient reaches and does not leave; None where that is not seen.

    Args:
        loss: a callable on the output that returns a scalar.
        output: of the model.
        rows: the samples of which nothing leaves it; None for all entries.
    """
    lines, stopping, leaves = _Lines(), list[Node](), list[Tensor]()

    def leaf(tensor: Tensor) -> Tensor:
        if not differentiable(tensor):
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with unchanged_randomness(), torch.enable_grad(), lines:
        scalar = loss(map_tensors(output, leaf))
    if scalar.grad_fn is None:
        return None

    def passes(gradients: Sequence[Tensor | None]) -> bool:
        """Whether something of these samples is there; what has no rows belongs to all."""
        found = [g for g in gradients if g is not None]
        if rows is not None:
            found = [g[rows.to(g.device)] if g.dim() and len(g) == len(rows) else g for g in found]
        return any(bool((g != 0).any()) for g in found)

    def watching(node: Node) -> Any:
        def hook(leaving: Sequence[Tensor | None], arriving: Sequence[Tensor | None]) -> None:
            if leaving and passes(arriving) and not passes(leaving):
                stopping.append(node)

        return hook

    for node in nodes_above(scalar):
        node.register_hook(watching(node))
    torch.autograd.grad(scalar, leaves, allow_unused=True)
    bounds = [bound for node in reversed(stopping) for bound in _bounds_behind(node) if bound in lines.of]
    named = bounds or [node for node in stopping if node in lines.of]
    return _read(named[0], *lines.of[named[0]]) if named else None


def _read(node: Node, name: str, place: str, given: Any) -> Stop:
    """What an operation does there, and what to do about it."""
    kind, facts = operation(node), activation_of(node)
    words = f"it ends at {name}{f' ({place})' if place else ''}"
    if kind in _NO_SLOPE:
        return Stop(
            f"{words}, whose derivative is zero everywhere",
            f"take the loss of what goes into {name}, and round for the report alone; or pass the gradient straight "
            f"through, x + ({name}(x) - x).detach()",
        )
    if kind in _BRANCHES:
        return Stop(
            f"{words}, whose condition takes the other branch wherever an output stands",
            f"look at the condition of {name}: let it pass some of the outputs, or weigh both branches by a "
            "probability in its place",
        )
    if facts is not None and facts.piecewise_linear and facts.kinks:
        words = f"{words}, out of whose range all lies that these give{_range(given)}"
        if _is_of_boxes(node):
            return Stop(
                f"{words}: boxes that do not meet have no common area",
                "take an IoU that falls with the distance of boxes (GIoU, DIoU: "
                "torchvision.ops.generalized_box_iou_loss), or smooth L1 of the coordinates first",
                boxes=True,
            )
        if len(facts.kinks) == 1:
            return Stop(words, f"keep a slope there: softplus in the place of {name}, or one that leaks")
        low, high = min(facts.kinks), max(facts.kinks)
        smooth = f"{low:.3g} + " * bool(low) + f"{high - low:.3g} * " * (high - low != 1) + "sigmoid(x)"
        return Stop(words, f"leave {name} out of the loss, or take a bound that keeps a slope: {smooth}")
    if kind in _ON_LOGITS:
        return Stop(
            f"{words}, which is flat in {_dtype(given)} where it is given{_range(given, ' numbers')}",
            f"take {_ON_LOGITS[kind]}, which keep a slope; and look why the last layer gives numbers that large",
        )
    if facts is not None and facts.is_bounded:
        return Stop(
            f"{words}, which is flat in {_dtype(given)} where it is given{_range(given, ' numbers')}",
            f"keep what goes into {name} near zero (a last layer of usual size, inputs of unit scale), or take the "
            f"loss of what goes into it",
        )
    if kind == "Mul":
        return Stop(f"{words}, where all of it is multiplied by zero", "look at what multiplies it: a mask, a weight")
    return Stop(
        f"{words}, whose derivative is zero where it is given{_range(given, ' these numbers')}",
        f"take an operation that keeps a slope in the place of {name}, or give it other numbers",
    )


def _range(given: Any, otherwise: str = "") -> str:
    if not isinstance(given, Tensor) or not given.numel() or given.is_complex():
        return otherwise
    values = given.detach().double()
    return f" ({float(values.min()):.3g} to {float(values.max()):.3g})"


def _dtype(given: Any) -> str:
    return str(given.dtype).removeprefix("torch.") if isinstance(given, Tensor) else "this precision"


def _bounds_behind(node: Node) -> list[Node]:
    """The bounds that an operation is, or that its factors come from: a product of zeros ends what they have let by."""
    if _is_bound(node):
        return [node]
    if operation(node) not in ("Mul", "Prod"):
        return []
    return [each for each in nodes_from(node) if _is_bound(each)]


def _is_bound(node: Node) -> bool:
    """Whether it is flat beyond a bound, or where a condition says so."""
    facts = activation_of(node)
    return operation(node) == "Where" or (facts is not None and facts.piecewise_linear and bool(facts.kinks))


def _is_of_boxes(node: Node) -> bool:
    """Whether what is clamped is the smaller of some ends less the larger of some beginnings."""
    return {"Maximum", "Minimum"} <= {operation(each) for each in nodes_from(node)}


def cut_stop(call: ForwardPass, loss: Any) -> Stop | None:
    """The operation by which a loss leaves the graph of the output; None where that is not seen.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
    """
    watch, made = Exits(), list[Any]()

    def noted(output: Any) -> Any:
        made.append(loss(output))
        return made[-1]

    try:
        training_pass(call, noted, watch, differentiate=False)
    except StabkitError:
        return None
    cut = watch.end_in_loss(made[0] if made and isinstance(made[0], Tensor) else None)
    if cut is None:
        return None
    return Stop(f"it ends at {cut.place}", _remedy_of_cut(cut.operation))


def _remedy_of_cut(name: str) -> str:
    base = name.removeprefix(INDICES)
    if base in _CHOICES:
        return (
            "take cross_entropy of the scores in the place of the best class, which has no derivative; count hits for "
            "the report alone"
        )
    if base in _THRESHOLDS:
        return (
            "take the loss of the probabilities in the place of the threshold, which has no derivative "
            "(binary_cross_entropy_with_logits, a soft Dice or IoU); compare for the report alone"
        )
    if name == "detach":
        return "take the detach away: only targets are taken off the graph, not what is to be trained"
    if name == "no_grad":
        return "take no_grad away from what is to be trained"
    if name in _GIVEN:
        return f"stay within torch: {name} gives numbers without a history, and the loss is to be made of tensors"
    return remedy_for(name)
