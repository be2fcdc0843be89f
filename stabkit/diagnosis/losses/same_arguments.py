"""A loss that is given one tensor twice where two are to be held against each other.

The anchor as its own negative, an output as its own target, a distance of an output to itself: what is taken of the two
is the same whatever is learnt. A loss of anchors, positives and negatives then pulls or pushes alone. Where an output
of the model goes unread, it takes the place on trial.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.remedies.short_training import trained_on_either
from stabkit.tracing import Flow
from stabkit.tracing.cutting.endpoints import outputs_read
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line

_TRIPLET = ("anchor", "positive", "negative")
#: the names of what must differ, in the order in which a function takes it
_HELD_APART: dict[str, tuple[str, ...]] = {
    "triplet_margin_loss": _TRIPLET,
    "triplet_margin_with_distance_loss": _TRIPLET,
    "margin_ranking_loss": ("input1", "input2"),
    "cosine_embedding_loss": ("input1", "input2"),
    "pairwise_distance": ("x1", "x2"),
    "cosine_similarity": ("x1", "x2"),
    "mse_loss": ("input", "target"),
    "l1_loss": ("input", "target"),
    "smooth_l1_loss": ("input", "target"),
    "huber_loss": ("input", "target"),
    "sub": ("input", "other"),
}
_MEANS = {
    ("anchor", "negative"): "so that their distance is none, and nothing pushes samples apart: what is left pulls the "
    "positive to the anchor, and is least where all outputs are the same",
    ("anchor", "positive"): "so that their distance is none, and nothing pulls samples together",
    (
        "positive",
        "negative",
    ): "so that their distances to the anchor are the same, and their difference is no matter of what is learnt",
}
_ALONE = "so that what is taken of the two is the same, whatever is learnt"
_REFERENCE = "Schroff, Kalenichenko and Philbin, FaceNet: a unified embedding for face recognition, 2015, section 3.1"


@dataclass(frozen=True)
class _Twice:
    """A call that is given one tensor twice.

    Attributes:
        name: the function.
        line: the line of code that calls it.
        pair: the names of the two arguments.
        place: of the second one among its arguments.
    """

    name: str
    line: str
    pair: tuple[str, str]
    place: int


class _Watch(FunctionCalls):
    """Notes what is given twice; gives another tensor in the place of the second of one call."""

    def __init__(
        self,
        chosen: _Twice | None = None,
        other: Callable[[Tensor], Tensor] | None = None,
        *,
        by_numbers: bool = True,
    ) -> None:
        super().__init__()
        self.found: list[_Twice] = []
        self._chosen, self._other, self._by_numbers = chosen, other, by_numbers

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = {"rsub": "sub", "subtract": "sub"}.get(name_of(func), name_of(func))
        names = _HELD_APART.get(name)
        if names is None:
            return func(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | {key: kwargs[key] for key in names if key in kwargs}
        alike = _equal if names is _TRIPLET and self._by_numbers else _same
        twice = next((pair for pair in itertools.combinations(given, 2) if alike(given[pair[0]], given[pair[1]])), None)
        if twice is None:
            return func(*args, **kwargs)
        found = _Twice(name, calling_line(), twice, names.index(twice[1]))
        self.found.append(found)
        if found == self._chosen and self._other is not None:
            other = self._other(given[twice[1]])
            if found.place < len(args):
                args = (*args[: found.place], other, *args[found.place + 1 :])
            else:
                kwargs = kwargs | {twice[1]: other}
        return func(*args, **kwargs)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are one tensor on the graph; what was taken off it may stand for itself on purpose."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape or one.numel() < 2:
        return False
    if not (one.requires_grad and other.requires_grad):
        return False
    return one is other or (
        one.grad_fn is not None and one.grad_fn is other.grad_fn and one.output_nr == other.output_nr
    )


def _equal(one: Any, other: Any) -> bool:
    """Whether they are one tensor, or hold the same numbers, of which not all rows are the same."""
    if _same(one, other):
        return True
    both = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.dim() > 1
    return (
        both and one.requires_grad and other.requires_grad and torch.equal(one, other) and bool((one != one[:1]).any())
    )


def same_argument_findings(flow: Flow, loss: Callable[[Any], Tensor]) -> list[Finding]:
    """A finding where a loss holds a tensor against itself."""
    # two passes of one input differ by their dropout, which is off in evaluation
    drops = any(isinstance(module, _DropoutNd) for module in flow.model.modules()) and not flow.model.training
    with torch.enable_grad(), (watch := _Watch(by_numbers=not drops)):
        loss(flow.output)
    if not watch.found:
        return []
    first = watch.found[0]
    evidence = (
        f"{first.name} ({first.line}) is given the same numbers as its {first.pair[0]} and its {first.pair[1]}, "
        f"{_MEANS.get(first.pair, _ALONE)}"
    )
    remedy = f"give {first.name} another tensor as its {first.pair[1]}"
    unread = _unread(flow, loss)
    if unread:
        told = _tried(flow, loss, first, unread)
        evidence += f"; the output {unread!r} is read by nothing{told}"
        remedy = f"give {first.name} the output {unread!r} as its {first.pair[1]}"
    elif first.name == "sub" and (told := _taken_off(flow, loss, first)):
        evidence += told
        remedy = (
            "take what is subtracted off the graph, x - x.detach(), where it stands for the value from before, as in a "
            "ratio of policies; where two are to be compared, give another tensor"
        )
    return [of_last_step(flow, "loss", "warning", LOSS, evidence, remedy, _REFERENCE, {"given": len(watch.found)})]


def _taken_off(flow: Flow, loss: Callable[[Any], Tensor], found: _Twice) -> str:
    """What the gradient by the output is with the second taken off the graph, where it is zero as it is."""
    edges = [value.edge for value in flow.states[-1].values]
    sizes = []
    for watch in (_Watch(), _Watch(found, lambda t: t.detach())):
        with torch.enable_grad(), watch:
            scalar = loss(flow.output)
        gradients = torch.autograd.grad(scalar, edges, retain_graph=True, allow_unused=True)
        sizes.append(sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5)
    if sizes[0] > 0 or not sizes[1] > 0:
        return ""
    return f": the gradient of the loss by the output is zero, and {sizes[1]:.2g} with the second taken off the graph"


def _unread(flow: Flow, loss: Callable[[Any], Tensor]) -> str:
    """The one output that the loss does not read and that has the shape of one which it does; empty without one."""
    shapes = {path: t.shape for path, t in named_tensors(flow.output) if t.requires_grad}
    read = set(outputs_read(loss, flow.output))
    left = [path for path in shapes if path not in read and shapes[path] in [shapes[p] for p in read if p in shapes]]
    return left[0] if len(left) == 1 else ""


def _tried(flow: Flow, loss: Callable[[Any], Tensor], found: _Twice, path: str) -> str:
    """What the loss with another output in its place comes to by training on either, in words; empty where unknown."""

    def meant(output: Any) -> Tensor:
        with _Watch(found, lambda _: dict(named_tensors(output))[path]):
            return loss(output)

    told = trained_on_either(flow, loss, meant, min)
    return f", and the loss with it in that place was tried on a copy{told}" if told else ""
