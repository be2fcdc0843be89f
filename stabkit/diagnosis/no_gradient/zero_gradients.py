"""Parameters whose gradient is exactly zero although the loss is made of them, and would stay so.

A gradient of zero is no fault by itself: behind a branch that starts at zero it comes as soon as that branch has moved.
So everything that has a gradient is moved, until what has none is always the same; what is left is stuck. It is named
by its cause: an operation whose derivative is zero everywhere, one that is given nothing within its range, or a product
whose factors are all zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.diagnosis.finding import Action, Finding, of_last_step, serious
from stabkit.diagnosis.no_gradient.closed_operations import any_entry, closed_findings
from stabkit.diagnosis.no_gradient.lost_parameters import role_of
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.short_training import (
    clearly_better,
    compared,
    falls,
    short_training,
    worse,
)
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import operation, value_of
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import Observer, TrainingPass, calling_line, nodes_above, training_pass
from stabkit.vocabulary import moves

#: operations whose derivative is zero wherever there is one
FLAT = {"Round": "round", "Floor": "floor", "Ceil": "ceil", "Trunc": "trunc", "Sign": "sign", "Sgn": "sign"}
_FEW = 0.05  # of the numbers that train, under which vectors alone are no fault of a model that learns
_MOVE = 0.01  # of the size of a parameter: what a step of a usual optimizer moves it by, or less
_MOST_ROUNDS = 8  # zero factors within zero factors
_MOST_TRIALS = 6  # kinds of parameters that are drawn anew
_BENGIO = "Bengio et al., Estimating or propagating gradients through stochastic neurons, 2013"
_LORA = "Hu et al., LoRA: Low-rank adaptation of large language models, 2022, section 4.1"
_MOVES = moves("reshape", "permute", "copy", "expand")
_PRODUCTS = frozenset({"Mm", "Addmm", "Bmm", "Baddbmm", "Mv"})


def zero_gradient_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """Parameters that nothing will ever move, with what holds them; without a loss nobody knows.

    What moves once the remedies of other findings are carried out follows from them: units that a dead layer feeds.
    """
    zeros = zeros_of(run.done)
    if not zeros or not callable(run.loss) or not _moved_by_output(run.done):
        return []
    flat = _behind_flat(run.call, run.loss, zeros)
    found = [_of_flat(run, flat)] if flat.parameters else []
    rest = [path for path in zeros if path not in flat.parameters]
    cured = [action for finding in others if serious(finding) for action in finding.actions]
    stuck = _stuck(run, cured) if rest else None
    left = tuple(path for path in rest if stuck is not None and path in stuck)
    if left:
        closed, behind = closed_findings(run, left)
        found += closed
        left = tuple(path for path in left if path not in behind)
    if left:
        found += _of_zero_factors(run, left) or zero_input_findings(run, left)
    return found


def zeros_of(done: TrainingPass) -> list[str]:
    """Parameters that the loss is made of and does not depend on where it stands."""
    return [path for path, g in done.gradients.items() if g is not None and g.numel() and not any_entry(g)]


def _moved_by_output(done: TrainingPass) -> bool:
    """Whether anything in reach has a gradient: a loss that is satisfied, or flat, is no matter of its parameters."""
    assert done.loss is not None
    seen = [t for t in _tensors(done.output) if t.requires_grad]
    found = torch.autograd.grad(done.loss, seen, retain_graph=True, allow_unused=True) if seen else ()
    return any(g is not None and any_entry(g) for g in found)


def _tensors(output: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(output)]


@dataclass
class _Flat:
    """Parameters from which every way to the loss goes through operations without slope."""

    parameters: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    path: str = ""


class _Watch(Observer):  # type: ignore[no-untyped-call]
    """Notes which line and module runs an operation without slope."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Node, tuple[str, str]] = {}
        self._waiting: list[tuple[Tensor, str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[-1].strip("_") in FLAT.values():
            self._waiting.append((out, self.recording.running, calling_line()))
        return out

    def placed(self) -> dict[Node, tuple[str, str]]:
        """Module and line by node: below autograd a result does not have its node yet."""
        return {t.grad_fn: (path, line) for t, path, line in self._waiting if t.grad_fn is not None}


def _behind_flat(call: ForwardPass, loss: Any, zeros: Sequence[str]) -> _Flat:
    watch = _Watch()
    done = training_pass(call, loss, watch, differentiate=False)
    assert done.loss is not None
    flat = flat_nodes(done.loss)
    if not flat:
        return _Flat()
    reached = variables_round(done.loss, flat)
    behind = tuple(path for path in zeros if id(done.parameters[path]) not in reached)
    mine = {id(done.parameters[path]) for path in behind}
    guilty = [node for node in flat if mine & {id(n.variable) for n in _above(node) if hasattr(n, "variable")}]
    places = watch.placed()
    known = [places[node] for node in guilty[::-1] if node in places]
    paths = tuple(dict.fromkeys(path for path, _ in known if path))
    lines = tuple(dict.fromkeys(line for _, line in known if line))
    operations = tuple(dict.fromkeys(FLAT[operation(node)] for node in guilty))
    return _Flat(behind, operations, (*paths, *lines), paths[0] if paths else "")


def flat_nodes(scalar: Tensor) -> list[Node]:
    """The operations behind a loss whose derivative is zero everywhere."""
    return [node for node in nodes_above(scalar) if _is_flat(node)]


def _is_flat(node: Node) -> bool:
    metas: Any = getattr(node, "_input_metadata", [])
    return operation(node) in FLAT and not any(meta.dtype.is_complex for meta in metas)


def variables_round(scalar: Tensor, closed: Sequence[Node]) -> set[int]:
    """Leaves that a loss is made of by ways round some nodes."""
    return {id(node.variable) for node in _above(value_of(scalar).node, frozenset(closed)) if hasattr(node, "variable")}


def _above(node: Node, closed: frozenset[Node] = frozenset()) -> list[Node]:
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found or current in closed:
            continue
        found[current] = None
        stack.extend(parent for parent, _ in current.next_functions if parent is not None)
    return list(found)


def straight_through(scalar: Tensor) -> None:
    """Give every operation without slope behind a loss the derivative 1, for the gradients that are taken of it."""
    for node in flat_nodes(scalar):
        node.register_hook(lambda _inputs, outputs: (outputs[0],))


def _of_flat(run: TrainingRun, flat: _Flat) -> Finding:
    operations = " and ".join(f"torch.{name}" for name in flat.operations)
    plain = short_training(run.flow, run.loss)
    through = short_training(run.flow, run.loss, altered=straight_through)
    evidence = (
        f"{len(flat.parameters)} of {len(run.done.parameters)} parameters that are to be trained get a gradient of "
        f"exactly zero ({listed(flat.parameters)}; {run.share(flat.parameters):.0%} of their numbers): the loss "
        f"is made of them through {operations} ({listed(flat.places, 5)}) alone, whose derivative is zero everywhere"
    )
    return of_last_step(
        run.flow,
        "no_gradient",
        "critical" if run.share(flat.parameters) > 1 - 1e-9 else "warning",
        flat.path,
        evidence=evidence + compared(plain, through, "with the derivative 1 in its place"),
        remedy=f"pass the gradient straight through: x + ({flat.operations[0]}(x) - x).detach() in place of "
        f"{flat.operations[0]}(x)",
        reference=_BENGIO,
        numbers={
            "parameters": float(len(flat.parameters)),
            "share": run.share(flat.parameters),
            f"closed:{' and '.join(flat.operations)}": 1.0,
        },
    )


def _stuck(run: TrainingRun, actions: Sequence[Action] = ()) -> frozenset[str] | None:
    """What still has no gradient when all that has one was moved; None where that cannot be tried."""
    held = [remedies.scale(path, 1.0) for path in run.done.parameters]  # the model's own are never written
    before: frozenset[str] | None = None
    try:
        with carried_out(run.call.module, held), carried_out(run.call.module, actions):
            for _ in range(_MOST_ROUNDS):
                now = training_pass(run.call, run.loss)
                zeros = frozenset(zeros_of(now))
                if not zeros or zeros == before:
                    return zeros
                before = zeros
                _move(now.parameters, now.gradients)
    except (StabkitError, RuntimeError):
        return None
    return before


def _move(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    with torch.no_grad():
        for path, parameter in parameters.items():
            gradient = gradients.get(path)
            if gradient is None or not any_entry(gradient) or not bool(gradient.isfinite().all()):
                continue
            size = _rms(parameter) or 1.0
            parameter.sub_(gradient.to_dense() / _rms(gradient.to_dense()), alpha=_MOVE * size)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def _of_zero_factors(run: TrainingRun, stuck: tuple[str, ...]) -> list[Finding]:
    """Stuck parameters that get a gradient when others of zeros are drawn anew: the first of each product."""
    empty = [path for path in stuck if not bool(run.done.parameters[path].detach().any())]
    left, actions = frozenset(stuck), list[Action]()
    for role in list(dict.fromkeys(map(role_of, empty)))[:_MOST_TRIALS]:
        members = [path for path in empty if role_of(path) == role and path in left]
        drawn = [remedies.redraw(path, _usual(run.done.parameters[path])) for path in members]
        after = _stuck(run, [*actions, *drawn]) if members else None
        if after is not None and len(left & after) < len(left):
            left, actions = left & after, [*actions, *drawn]
    if left and (
        drawn := _all_matrices(run.done, empty)
    ):  # all were started at zero, so that no kind of them is enough
        after = _stuck(run, drawn)
        if after is not None and len(frozenset(stuck) & after) < len(left):
            left, actions = frozenset(stuck) & after, drawn
    freed = tuple(path for path in stuck if path not in left)
    if not freed:
        return []
    named = tuple(str(action["parameter"]) for action in actions)
    both = tuple(path for path in freed if path in empty)
    kept = tuple(path for path in both if path not in named)
    plain, treated = short_training(run.flow, run.loss), short_training(run.flow, run.loss, actions)
    vectors = all(run.done.parameters[path].dim() < 2 for path in named)
    if vectors and plain is not None and treated is not None and not clearly_better(treated, plain):
        return []  # biases of zero are how layers are made: what holds them is another, as a layer that is dead
    # a bias between two norms of a small batch has no gradient either, and the model trains without it
    few = run.share(freed) < _FEW and all(run.done.parameters[path].dim() < 2 for path in freed)
    harmless = worse(treated, plain) or (few and plain is not None and falls(plain))
    evidence = (
        f"{len(freed)} of {len(run.done.parameters)} parameters that are to be trained get a gradient of exactly zero "
        f"({listed(freed)}; {run.share(freed):.0%} of their numbers), and still do when all others have moved: "
        f"they are the factors of products in which {listed(both)} are all zero, so that neither moves the other; with "
        f"{listed(named)} drawn anew all of them get a gradient"
    )
    return [
        of_last_step(
            run.flow,
            "no_gradient",
            "info" if harmless else "critical" if run.share(freed) > 1 - 1e-9 else "warning",
            named[0].rpartition(".")[0],
            evidence=evidence + compared(plain, treated, "treated"),
            remedy="none is needed: the model trains without it"
            if harmless
            else f"start {listed(named)} from random numbers (root mean square "
            f"{max(float(action['rms']) for action in actions):.2g})"
            + (f"; {listed(kept)} may stay at zero" if kept else ""),
            reference=_LORA,
            numbers={"parameters": float(len(freed)), "share": run.share(freed)},
            actions=() if harmless else tuple(actions),
        )
    ]


def _all_matrices(done: TrainingPass, empty: Sequence[str]) -> list[Action]:
    matrices = [path for path in empty if done.parameters[path].dim() > 1]
    return [remedies.redraw(path, _usual(done.parameters[path])) for path in matrices]


def _usual(parameter: Tensor) -> float:
    """The size that `torch.nn.Linear` starts a weight of this shape with."""
    fan_in = parameter.numel() / parameter.shape[0] if parameter.dim() > 1 else 1.0
    return float((3.0 * fan_in) ** -0.5)


def zero_input_findings(run: TrainingRun, zeros: Sequence[str]) -> list[Finding]:
    """Parameters without gradient that are multiplied with constants of zeros alone, told as a fact.

    ``zeros`` are the parameters whose gradient is exactly zero, whatever else has moved.
    """
    assert run.done.loss is not None
    readers: dict[Node, list[Node]] = {}
    for node in nodes_above(run.done.loss):
        for parent, _ in node.next_functions:
            if parent is not None:
                readers.setdefault(parent, []).append(node)
    leaves: dict[int, Node] = {id(leaf.variable): leaf for leaf in map(_leaf, readers) if leaf is not None}
    idle = tuple(p for p in zeros if (leaf := leaves.get(id(run.done.parameters[p]))) and _meets_zeros(leaf, readers))
    if not idle:
        return []
    share = run.share(idle)
    return [
        of_last_step(
            run.flow,
            "no_gradient",
            "info",
            idle[0].rpartition(".")[0],
            evidence=f"{len(idle)} of {len(run.done.parameters)} parameters that are to be trained get a gradient of "
            f"exactly zero ({listed(idle)}; {share:.0%} of their numbers): all that they multiply are constants of "
            "zeros, as the state that a recurrence begins with",
            remedy="none is needed where a recurrence is meant to run for one step alone; else carry its state on from "
            "call to call, and look which axis it takes for time (batch_first)",
            reference="",
            numbers={"parameters": float(len(idle)), "share": share},
        )
    ]


def _leaf(node: Any) -> Any:
    return node if hasattr(node, "variable") else None


def _meets_zeros(leaf: Node, readers: dict[Node, list[Node]]) -> bool:
    """Whether everything that reads a leaf, but for how its entries are ordered, multiplies it with constant zeros."""
    stack, met = [leaf], False
    while stack:
        for reader in readers[stack.pop()]:
            if operation(reader) in _MOVES:
                stack.append(reader)
            elif operation(reader) in _PRODUCTS and _with_zeros(reader):
                met = True
            else:
                return False
    return met


def _with_zeros(node: Any) -> bool:
    """Whether a product has a factor that is a constant of zeros."""
    saved = [getattr(node, f"_saved_{name}", None) for name in ("self", "mat1", "mat2", "batch1", "batch2", "vec")]
    return any(isinstance(t, Tensor) and not t.requires_grad and not bool(t.detach().any()) for t in saved)
