"""Shares of a whole that has one part: 1 whatever they are made of, so that nothing is learnt of that.

A softmax over one score, or a number divided by the sum of itself alone, is 1. Routers that choose one expert and weigh
it after the choice are so, and softmaxes along an axis of one entry. What decides the score gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import Finding, of_module, serious
from stabkit.diagnosis.no_gradient.zero_gradients import variables_round
from stabkit.diagnosis.remedies.short_training import STEPS, short_training, worse
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import (
    Observer,
    calling_line,
    nodes_above,
    path_of,
    training_pass,
)
from stabkit.vocabulary import moves

_ROUNDING = 1e-5  # by how much a share may miss 1: a small number that keeps a sum from zero
_NOTHING = 1e-4  # of the gradient that there is with another weight: rounding, not a gradient
_MASKED = -1e4  # scores from which on a softmax is told to leave an entry out: the largest fill that float16 holds
_DIVISIONS = frozenset({"div", "truediv", "true_divide", "divide"})
_CHOICES = frozenset({"Topk", "Gather", "Sort", "Max", "Scatter", "MaskedFill", "Where"})
_ON_THE_WAY = moves("reshape", "permute", "copy", "select", "gather")
_REFERENCE = "Fedus et al., Switch transformers, 2022, section 2.1: the probability among all experts weighs the one"


def share_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where parameters reach the loss through such shares alone.

    A softmax of one score that ends a model is told by what the states show.
    """
    if run.done.loss is None:
        return []
    told = {finding.module_path for finding in others if serious(finding) and finding.module_path}
    nodes = [n for n in nodes_above(run.done.loss) if _is_one(n) and path_of(run.done, n) not in told]
    if not nodes:
        return []
    reached = variables_round(run.done.loss, nodes)
    behind = tuple(
        p for p, g in run.done.gradients.items() if g is not None and id(run.done.parameters[p]) not in reached
    )
    weighed = _Weighed()
    gradients = _gradients(run.call, run.loss, weighed) if behind else None
    if (
        gradients is None
        or not weighed.lines
        or not all(_gains(run.done.gradients[p], gradients.get(p)) for p in behind)
    ):
        return []
    return [_finding(run, nodes[-1], behind, weighed)]


def _is_one(node: Any) -> bool:
    """Whether the result of a softmax, or of a division, is 1 wherever it is not 0, and was made of what is trained."""
    if operation(node) == "Softmax":
        result = node._saved_result.detach()
        return bool(((result == 1) | (result == 0)).all())
    if operation(node) == "Div":
        one, other = (getattr(node, f"_saved_{name}", None) for name in ("self", "other"))  # of a number: no tensor
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or any(p is None for p, _ in _parents(node)):
            return False
        return one.dim() > 0 and bool((one.detach() / other.detach() - 1).abs().le(_ROUNDING).all())
    return False


def _parents(node: Node) -> Sequence[tuple[Node | None, int]]:
    return (*node.next_functions, (None, 0))[:2]


class _Weighed(FunctionCalls):
    """Gives, in the place of shares of one part, the sigmoid of the score, or the number before it is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        out = func(*args, **kwargs)
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, Tensor) or not isinstance(out, Tensor) or not out.requires_grad:
            return out
        if name == "softmax" and _of_one_score(given, out):
            self.lines[calling_line()] = "softmax"
            return given.sigmoid().to(out.dtype)
        if name in _DIVISIONS and given.shape == out.shape and out.grad_fn is not None and _is_one(out.grad_fn):
            self.lines[calling_line()] = "a division by the sum"
            return given
        return out


def _of_one_score(scores: Tensor, shares: Tensor) -> bool:
    """Whether a softmax is told of one score in every row: the others, if any, are left out by a mask."""
    left = scores.detach()[shares.detach() == 0]
    return bool(((shares == 1) | (shares == 0)).all()) and bool((left <= _MASKED).all())


def _gradients(call: ForwardPass, loss: Any, mode: FunctionCalls) -> dict[str, Tensor | None] | None:
    try:
        return training_pass(call, loss, Observer(mode)).gradients
    except (StabkitError, RuntimeError):
        return None  # the code does not stand other numbers


def _gains(plain: Tensor | None, treated: Tensor | None) -> bool:
    """Whether a parameter has as good as no gradient, and one with another weight: a bias may have none in either."""
    if plain is None or treated is None:
        return False
    sizes = [float(torch.linalg.vector_norm(g.detach().to_dense().double())) for g in (plain, treated)]
    return sizes[0] <= _NOTHING * sizes[1]


def _finding(run: TrainingRun, first: Any, behind: tuple[str, ...], weighed: _Weighed) -> Finding:
    path, chosen = path_of(run.done, first), _of_a_choice(first)
    # a layer that gives one score does so for any input; one position is what this input has
    single = any(run.done.parameters[p].dim() > 1 and len(run.done.parameters[p]) == 1 for p in behind)
    share = run.share(behind)
    lines, how = listed(tuple(filter(None, weighed.lines))), next(iter(weighed.lines.values()))
    plain, treated = short_training(run.flow, run.loss), short_training(run.flow, run.loss, within=_Weighed)
    evidence = (
        f"{len(behind)} of {len(run.done.parameters)} parameters that are to be trained get no gradient "
        f"({listed(behind)}; {share:.0%} of their numbers): they reach the loss only through {how} of a single number"
        f"{f', {lines}' if lines else ''}, which is 1 whatever they are; tried on a copy: with "
        f"{'the number itself' if how != 'softmax' else 'a sigmoid'} in its place all of them get one"
    )
    if plain is not None and treated is not None and not worse(treated, plain):
        evidence += f", and {STEPS} steps of plain SGD take the loss {treated}, as it is {plain}"
    return of_module(
        run.flow,
        "no_gradient",
        "warning" if chosen or single else "info",
        path,
        evidence=evidence,
        remedy=_remedy(first, chosen, single),
        reference=_REFERENCE if chosen else "",
        numbers={"parameters": float(len(behind)), "share": share},
    )


def _remedy(node: Any, chosen: bool, single: bool) -> str:
    if chosen:
        return (
            "take the softmax over all scores before the choice and weigh what is chosen with its share of them, "
            "without dividing by the sum of the chosen where one is chosen; or weigh it with the sigmoid of its score"
        )
    if not single:
        return "none is needed where longer sequences, or larger images, come: of one position there is none to choose"
    shape = tuple(node._saved_result.shape) if operation(node) == "Softmax" else ()
    longer = [axis - len(shape) for axis, size in enumerate(shape) if axis > 0 and size > 1]
    along = f"take it along the axis that is chosen from (dim={longer[0]} of {shape}), or " if longer else ""
    return f"{along}put a sigmoid in the place of the softmax: it is told of one score"


def _of_a_choice(node: Any) -> bool:
    """Whether what becomes a share was chosen among others, by moves alone."""
    return any(name in _CHOICES for name in _made_by(node))


def _made_by(node: Any) -> list[str]:
    """Names of the operations that a share is made by, up to the first that calculates."""
    found, seen = list[str](), set[Node]()
    stack = [parent for parent, _ in node.next_functions if parent is not None]
    while stack:
        each = stack.pop()
        if each in seen:
            continue
        seen.add(each)
        found.append(operation(each))
        if operation(each) in _ON_THE_WAY | _CHOICES | {"Sum", "Mul", "Div"}:
            stack += [parent for parent, _ in each.next_functions if parent is not None]
    return found
