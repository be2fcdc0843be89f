"""Operations at which a gradient arrives and from which none leaves, since all that they are given lies out of range.

A sampling grid outside of the image, entries beyond the bounds of a clamp, a mask that lets nothing through: the layer
before them is healthy, and the derivative of the operation is exactly zero at these values. Units that are dead and
weights that are zero pass nothing either; of those others speak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import Finding, of_last_step
from stabkit.diagnosis.no_gradient.lost_parameters import role_of
from stabkit.diagnosis.non_finite.domains import count
from stabkit.diagnosis.remedies.other_arguments import Arguments, Change, OtherArguments
from stabkit.diagnosis.remedies.short_training import STEPS, short_training
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.recorder import clock
from stabkit.tracing.recording.training_pass import (
    Observer,
    calling_line,
    nodes_above,
    training_pass,
)
from stabkit.vocabulary import activation_of

_SAMPLERS = ("GridSampler2D", "GridSampler3D", "CudnnGridSampler")
_CLAMPED = (
    "bring what it is given into that range (start the layer before it smaller, subtract a mean, divide by a scale), "
    "or take a bound that keeps a slope, as tanh or sigmoid"
)
_LARGE = 0.2  # share of the trainable numbers from which one closed gate of many is more than a fact
_MASK = "look at the mask: it lets nothing of this through"
_ZEROS = "look at where these zeros come from: a product with them lets nothing through"


@dataclass(frozen=True)
class Closed:
    """An operation that passes nothing back although something arrives.

    Attributes:
        node: it.
        name: as a user calls it.
        text: how much of its argument lies out of which range.
        remedy: what to do.
        masked: whether a mask or other numbers that data may choose do it, and no range.
        path: the module that runs it; empty in code of the outermost module and in the loss.
        line: file and line of the code that calls it.
        how: how it is given numbers within its range, in words.
        functions: the functions of torch that run it.
        change: what brings their arguments within its range; None where that is not known.
        behind: the ids of the leaves that get nothing since nothing leaves it.
    """

    node: Node
    name: str
    text: str
    remedy: str
    masked: bool = False
    path: str = ""
    line: str = ""
    how: str = ""
    functions: tuple[str, ...] = ()
    change: Change | None = None
    behind: frozenset[int] = frozenset()

    @property
    def place(self) -> str:
        """Operation, module and line, in words."""
        return f"{self.name} in {self.path or 'the model'}" + (f", {self.line}" if self.line else "")


class _Places(Observer):  # type: ignore[no-untyped-call]
    """Which line and module runs the operation of every node."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, tuple[str, str, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.part != "backward":
            self.of[clock() - 1] = (self.recording.running, calling_line(), self.part)
        return out


def closed_operations(call: ForwardPass, loss: Any) -> list[Closed]:
    """Operations of the model that a gradient reaches and does not leave, of those whose range or mask says why."""
    places = _Places()
    done = training_pass(call, loss, places, differentiate=False)
    leaves = list(done.parameters.values())
    if done.loss is None or not leaves:
        return []
    stopping, reached = list[Node](), set[Node]()
    hooks = [node.register_hook(_watching(node, stopping, reached)) for node in nodes_above(done.loss)]
    with hooked(hooks):
        torch.autograd.grad(done.loss, leaves, retain_graph=True, allow_unused=True)
    found = []
    for node in stopping:
        path, line, part = places.of.get(node._sequence_nr(), ("", "", "model"))
        read = _read(node)
        if read is not None and part == "model":
            found.append(replace(read, path=path, line=line, behind=_leaves_behind(node, reached)))
    return found


def _leaves_behind(node: Node, reached: Collection[Node]) -> frozenset[int]:
    """The leaves on ways from a node on which nothing arrives any more.

    Where something arrives at what reads a leaf, it is what the leaf meets there that gives it no gradient: recurrent
    weights and a state that begins at zero.
    """
    found, stack = dict[Node, None](), [node]
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None and parent not in found and parent not in reached:
                found[parent] = None
                stack.append(parent)
    leaves: list[Any] = [each for each in found if hasattr(each, "variable")]
    return frozenset(id(leaf.variable) for leaf in leaves)


def _watching(node: Node, stopping: list[Node], reached: set[Node]) -> Callable[[Any, Any], None]:
    def hook(leaving: Sequence[Tensor | None], arriving: Sequence[Tensor | None]) -> None:
        came = any(g is not None and any_entry(g) for g in arriving)
        if came:
            reached.add(node)
        if came and leaving and not any(g is not None and any_entry(g) for g in leaving):
            stopping.append(node)

    return hook


def any_entry(gradient: Tensor) -> bool:
    """Whether a gradient has an entry that is not zero."""
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool((entries != 0).any())


def _read(node: Any) -> Closed | None:
    """What an operation was given and what to do; None for one of which others speak, or nothing is known."""
    name = operation(node)
    if name in _SAMPLERS:
        return _of_grid(node)
    if name == "Where":
        return Closed(
            node, "where", f"its condition takes the other branch in {_all(node._saved_condition)}", _MASK, True
        )
    if name == "MaskedFill":
        return Closed(node, "masked_fill", f"its mask fills {count(node._saved_mask)}", _MASK, True)
    if name == "Mul":
        return _of_factor(node)
    facts = activation_of(node)
    if facts is None or not (facts.piecewise_linear and facts.is_bounded and len(facts.kinks) == 2):
        return None  # units that are off on one side are dead, and told as such
    low, high = map(float, facts.kinks)
    x = node._saved_self.detach()
    outside = (x <= low) | (x >= high)
    text = (
        f"{count(outside)} lie out of its range ({low:g} to {high:g}), at {float(x.min()):.3g} to {float(x.max()):.3g}"
    )
    return Closed(
        node,
        facts.name,
        text,
        _CLAMPED,
        how="what it is given brought into that range, by a mean and a scale,",
        functions=(facts.name, "clip", "relu6"),
        change=_brought_within(low, high),
    )


def _brought_within(low: float, high: float) -> Change:
    """Arguments moved and scaled so that most of their entries lie within a range."""

    def change(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        x = args[0]
        unit = (x - x.detach().mean()) / x.detach().std(correction=0).clamp_min(1e-6)
        return ((low + high) / 2 + (high - low) / 4 * unit, *args[1:]), kwargs

    return change


def _all(condition: Tensor) -> str:
    share = max(float(condition.float().mean()), 1 - float(condition.float().mean()))
    return f"{round(share * condition.numel())} of {condition.numel()} entries"


def _of_grid(node: Any) -> Closed:
    grid, image = node._saved_grid.detach(), node._saved_input.detach()
    outside = (grid.abs() > 1).any(-1)
    sizes = list(image.shape[2:])[::-1]
    text = (
        f"{count(outside).replace('entries', 'points')} of its grid lie outside of -1 to 1, where the image ends: they "
        f"run from {float(grid.min()):.3g} to {float(grid.max()):.3g}"
    )
    formula = "2 g / (n - 1) - 1"

    def change(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        return (args[0], 2 * args[1] / (args[1].new_tensor(sizes) - 1).clamp_min(1) - 1, *args[2:]), kwargs

    remedy = f"give it coordinates from -1 to 1: of pixel coordinates g along n pixels (here {_by(sizes)}), {formula}"
    return Closed(
        node, "grid_sample", text, remedy, how=f"{formula} for its grid", functions=("grid_sample",), change=change
    )


def _is_given(tensor: Tensor) -> bool:
    """Whether no parameter is behind a tensor."""
    leaves: list[Any] = [node for node in nodes_above(tensor) if hasattr(node, "variable")] if tensor.grad_fn else []
    return not any(isinstance(leaf.variable, nn.Parameter) for leaf in leaves) and not isinstance(tensor, nn.Parameter)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _of_factor(node: Any) -> Closed | None:
    """A product with a constant, or an input, that is zero everywhere."""
    saved = (getattr(node, f"_saved_{name}", None) for name in ("self", "other"))
    given = [s for s in saved if isinstance(s, Tensor) and not bool(s.detach().any()) and _is_given(s)]
    if not given:
        return None
    return Closed(node, "a product", f"it multiplies by a constant of {given[0].numel()} zeros", _ZEROS, True)


def closed_findings(run: TrainingRun, zeros: Sequence[str]) -> tuple[list[Finding], frozenset[str]]:
    """What is found of parameters behind closed operations, and which those are.

    A mask may be what data choose: an expert to which nothing was sent. So of masks it is said where no parameter of
    the same role gets a gradient.

    ``zeros`` are the parameters whose gradient is exactly zero.
    """
    used = {role_of(path) for path, g in run.done.gradients.items() if g is not None and path not in zeros}
    guilty, behind = list[Closed](), dict[str, None]()
    for each in closed_operations(run.call, run.loss):
        mine = [
            p for p in zeros if id(run.done.parameters[p]) in each.behind and not (each.masked and role_of(p) in used)
        ]
        if mine:
            guilty.append(each)
            behind.update(dict.fromkeys(mine))
    if not guilty:
        return [], frozenset()
    first = guilty[0]
    held = sum(run.done.parameters[path].numel() for path in behind)
    share = held / max(1, sum(p.numel() for p in run.done.parameters.values()))
    others = tuple(dict.fromkeys(each.place for each in guilty[1:] if each.place != first.place))
    evidence = (
        f"{len(behind)} of {len(run.done.parameters)} parameters that are to be trained get a gradient of exactly zero "
        f"({listed(tuple(behind))}; {share:.0%} of their numbers): it arrives at {first.place} and does not leave it: "
        f"{first.text}" + (f"; the same at {listed(others)}" if others else "")
    )
    severity = "critical" if share > 1 - 1e-9 else "warning" if share >= _LARGE else "info"
    found = of_last_step(
        run.flow,
        "no_gradient",
        severity,
        first.path,
        evidence=evidence + _opened(run.flow, run.loss, run.call, first, behind),
        remedy=first.remedy,
        reference="Jaderberg et al., Spatial transformer networks, 2015" if first.name == "grid_sample" else "",
        numbers={"parameters": float(len(behind)), "share": share, f"closed:{first.name}": 1.0},
    )
    return [found], frozenset(behind)


def _opened(flow: Flow, loss: Any, call: ForwardPass, closed: Closed, behind: Collection[str]) -> str:
    """What is measured when the operation is given numbers within its range; empty where that cannot be tried."""
    if closed.change is None or not closed.line:
        return ""

    def within() -> OtherArguments:
        assert closed.change is not None
        return OtherArguments(closed.functions, closed.line, closed.change)

    try:
        done = training_pass(call, loss, Observer(within()))
    except (StabkitError, RuntimeError):
        return ""  # the code does not stand the change
    still = sum(1 for path in behind if (g := done.gradients.get(path)) is None or not any_entry(g))
    if still:
        return ""
    text = f"; tried on a copy: with {closed.how} all of these get a gradient"
    plain, treated = short_training(flow, loss), short_training(flow, loss, within=within)
    if plain is None or treated is None or not math.isfinite(treated.last):
        return text
    return f"{text}, and {STEPS} steps of plain SGD take the loss {treated}, as it is {plain}"
