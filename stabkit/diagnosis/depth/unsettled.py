"""Fixed points that are wanted and not reached: a module iterated without gradient, then called once with it.

That is how equilibrium models are written: their gradient is that of the fixed point, and means nothing where the
iteration did not arrive at one. The residual |f(z) - z| / |f(z)| of every call says whether it does, whatever solver
chooses the next z.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.errors import StabkitError
from stabkit.tracing import Flow, FlowLike, Iteration
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.training_pass import training_pass

_FEWEST = 8  # calls without gradient from which one speaks of an iteration
_REACHED = 1e-2  # relative residual from which the gradient at a fixed point means something
_FALLS = 0.99  # of the change of the call before: what falls less does not arrive
_SAMPLES, _MEMORY = 4, 5  # samples looked at, and states that a solver combines
_FITS = 1e-3  # relative distance of a state from what a solver can make
_CONTRACTS = 0.9  # by which a step is to stretch
_FEWEST_STEPS = 6  # steps from which one speaks of convergence
_SETTLED = 1e-2  # the last change beside the state, and beside the first change


@dataclass
class Iterates:
    """The calls of one module on its own output.

    Attributes:
        residuals: |f(z) - z| / |f(z)| of every call.
        changes: |f(z) - z| of every call.
        moved: how far the state moved in the end, over its size: where it stands still, the iteration arrived, whatever
            else than this module its map is made of.
    """

    residuals: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    moved: float = math.inf

    @property
    def stretch(self) -> float:
        """By how much a call multiplies the change of the call before, over the later half."""
        late = self.changes[len(self.changes) // 2 : -1]  # the last call may be made with what the one before was
        if len(late) < 2 or late[0] <= 0.0 or late[-1] <= 0.0:
            return math.nan
        return math.exp(math.log(late[-1] / late[0]) / (len(late) - 1))

    @property
    def arrives(self) -> bool:
        """Whether the residual is small in the end, or the changes still fall."""
        return self.residuals[-1] < _REACHED or self.stretch < _FALLS or self.moved < _REACHED


def unsettled_findings(flow: Flow) -> list[Finding]:
    """Modules that are iterated to a fixed point which they do not reach; empty for a model without any."""
    found = []
    for path in _iterated(flow):
        call = flow.forward_pass
        seen = _iterates(call, path)
        if seen is not None and math.isfinite(seen.residuals[-1]) and not seen.arrives:
            found.append(_finding(flow, path, seen))
    return found


def _iterated(flow: Flow) -> list[str]:
    """Modules that run again and again off the graph, and on it as well; the outermost alone."""
    modules = dict(flow.model.named_modules())
    silent: Counter[str] = Counter()
    on_graph = set()
    for call in flow.recorded.recording.calls:
        if call.start == call.stop:
            silent[call.path] += 1
        else:
            on_graph.add(call.path)
    often = [path for path, count in silent.items() if count >= _FEWEST and path in on_graph and path in modules]
    learns = [path for path in often if any(p.requires_grad for p in modules[path].parameters())]
    return [path for path in learns if not any(path.startswith(f"{other}.") for other in learns)]


def _iterates(call: ForwardPass, path: str) -> Iterates | None:
    """The residuals of a module over its calls in one forward pass; None where it is not given its own output."""
    given: list[list[Tensor]] = []
    made: list[Tensor] = []
    with _watched(call.module.get_submodule(path), given, made):
        training_pass(call, differentiate=False)
    if len(made) < _FEWEST or len({len(tensors) for tensors in given}) > 1:
        return None
    place = _state(given, made)
    if place is None or not _fed_back([tensors[place] for tensors in given], made):
        return None
    found = Iterates()
    for tensors, out in zip(given, made, strict=True):
        change = float((out - tensors[place]).norm())
        found.changes.append(change)
        found.residuals.append(change / max(float(out.norm()), 1e-30))
    states = [tensors[place] for tensors in given]
    steps = [float((b - a).norm()) / max(float(b.norm()), 1e-30) for a, b in itertools.pairwise(states)]
    found.moved = max([step for step in steps[-2:] if step > 0], default=math.inf)  # the last may be made twice
    return found


def _state(given: list[list[Tensor]], made: list[Tensor]) -> int | None:
    """Which argument is the state: the only one that is another at each call, and of the shape of the output.

    Where more change, as the pieces of a sequence or a time do, the map is another each time and has no fixed point.
    """
    moves = []
    for place in range(len(given[0])):
        moved = [not torch.equal(a[place], b[place]) for a, b in itertools.pairwise(given)]
        if sum(moved) > len(moved) / 2:
            moves.append(place)
    if len(moves) != 1 or any(t[moves[0]].shape != out.shape for t, out in zip(given, made, strict=True)):
        return None
    return moves[0]


def _fed_back(states: list[Tensor], made: list[Tensor]) -> bool:
    """Whether most states are combinations of the states and results before, as solvers make them.

    Plain and damped iteration combine the last two, Anderson's and Broyden's methods several of them. A layer whose
    result goes through something else before it comes back is only part of the map.
    """
    held = [[t.reshape(len(t), -1)[:_SAMPLES].double() for t in tensors if t.dim() > 1] for tensors in (states, made)]
    size = held[0][0].shape[1] if held[0] else 0
    memory = min(max(size // 8, 1), _MEMORY)  # few numbers are a combination of anything
    if size < 8 or not bool(torch.stack([*held[0], *held[1]]).isfinite().all()):
        return False
    fits = 0
    for k in range(1, len(held[0])):
        basis = torch.stack([t for part in held for t in part[max(0, k - memory) : k]], dim=2)
        target = held[0][k].unsqueeze(2)
        left = target - basis @ (torch.linalg.pinv(basis) @ target)
        fits += float(left.norm()) <= _FITS * float(target.norm())
    return 2 * fits > len(held[0]) - 1


@contextlib.contextmanager
def _watched(module: nn.Module, given: list[list[Tensor]], made: list[Tensor]) -> Iterator[None]:
    """Keep the tensors and numbers among the arguments, and the first result, of every call."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        out = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if out is not None and out.is_floating_point():
            held = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor | int | float)]
            given.append([t.detach().clone() if isinstance(t, Tensor) else torch.tensor(t) for t in held])
            made.append(out.detach().clone())

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with hooked([handle]):
        yield


def _finding(flow: Flow, path: str, seen: Iterates) -> Finding:
    count, last, stretch = len(seen.residuals), seen.residuals[-1], seen.stretch
    grows = f", and a call multiplies the change of the one before by {stretch:.2f}" if math.isfinite(stretch) else ""
    remedy, tried = _tried(flow, path, seen)
    return of_module(
        flow,
        "no_fixed_point",
        "warning",
        path,
        evidence=f"{path} ({type(flow.model.get_submodule(path)).__name__}) is iterated without gradient, and no fixed "
        f"point is reached: the relative residual |f(z) - z| / |f(z)| is {last:.2g} after {count} calls{grows}; the "
        f"gradient of a fixed point is not that of this state{tried}",
        remedy=remedy.text,
        reference="Bai et al., Stabilizing equilibrium models by Jacobian regularization, 2021; Winston, Kolter, 2020",
        numbers={"residual": last, "stretch": stretch, "calls": float(count)},
        actions=remedy.actions,
    )


def _tried(flow: Flow, path: str, seen: Iterates) -> tuple[Remedy, str]:
    """The mildest factor on the cell's matrices with which its iteration arrives on a copy, and what it changed."""
    without = Remedy(
        "nothing that was tried on its weights helps: add a penalty on its Jacobian to the loss, damp the iteration, "
        "or let the solver take more steps"
    )
    call = flow.forward_pass
    if not isinstance(call.model, nn.Module) or call.model is not call.module:
        return without, ""
    for remedy in _changes(call.module.get_submodule(path), path, seen):
        try:
            with carried_out(call.module, remedy.actions):
                after = _iterates(call, path)
        except StabkitError:
            continue
        if after is not None and after.residuals[-1] < _REACHED:
            change = f"{seen.residuals[-1]:.2g} -> {after.residuals[-1]:.2g} after {len(after.residuals)} calls"
            return remedy, f"; tried on a copy: relative residual {change}"
    return without, ""


def _changes(cell: nn.Module, path: str, seen: Iterates) -> list[Remedy]:
    """Factors on the matrices that can act on the state: square ones, or else all; the mildest first."""
    dot = "." if path else ""
    named = [(f"{path}{dot}{name}", p.detach()) for name, p in cell.named_parameters() if p.dim() >= 2]
    square = [(name, p) for name, p in named if p.shape[0] == p.shape[1]]
    matrices = square or named
    sizes = {name: float(torch.linalg.matrix_norm(p.double().flatten(1), 2)) for name, p in matrices}
    if not sizes:
        return []
    what = " and ".join(list(sizes)[:3]) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
    later = "keep it so with torch.nn.utils.parametrizations.spectral_norm, or a penalty on the Jacobian"
    found = []
    if math.isfinite(seen.stretch) and seen.stretch > _CONTRACTS:
        by = (_CONTRACTS / seen.stretch) ** (1.0 / len(sizes))
        text = f"multiply {what} by {by:.2g}, so that a call stretches by {_CONTRACTS}; {later}"
        found.append(Remedy(text, tuple(remedies.scale(name, by) for name in sizes)))
    for norm in (_CONTRACTS, _CONTRACTS / 2):
        factors = {name: norm / size for name, size in sizes.items() if size > norm}
        text = f"give {what} the spectral norm {norm:.2g} (now {max(sizes.values()):.2g}); {later}"
        found.append(Remedy(text, tuple(remedies.scale(name, by) for name, by in factors.items())))
    return [remedy for remedy in found if remedy.actions]


def settles(flow: FlowLike, measurement: Measurement, stretch: tuple[int, int]) -> str:
    """How the state settles, in words; empty where it does not, or where something that learns lies before.

    That the gradient with respect to the start vanishes is what convergence means, and no fault where nothing that
    learns lies before the start. What would be one is told elsewhere: samples that arrive at one and the same point,
    or units that are dead.
    """
    first, last = stretch
    if last - first + 1 < _FEWEST_STEPS or not _tied(flow, measurement, stretch):
        return ""
    states = list(flow.trajectory()) if isinstance(flow, Iteration) else [s.flatten() for s in flow.states]
    rows = [state.detach().double() for state in states[first : last + 2]]
    if len({row.shape for row in rows}) > 1:
        return ""
    sizes = [float(row.norm()) for row in rows]
    changes = [float((b - a).norm()) for a, b in itertools.pairwise(rows)]
    if min(sizes) == 0.0 or not np.isfinite(sizes).all():
        return ""
    relative = [change / size for change, size in zip(changes, sizes[1:], strict=True)]
    if relative[-1] >= _SETTLED or relative[-1] >= _SETTLED * relative[0]:
        return ""
    return (
        f"the same step is taken {len(changes)} times and settles at a fixed point (a step changes the state by "
        f"{relative[0]:.2g} of its size at first, by {relative[-1]:.2g} at last). That the gradient with respect to "
        "the start shrinks is what convergence means, and nothing that learns lies before the start"
    )


def _tied(flow: FlowLike, measurement: Measurement, stretch: tuple[int, int]) -> bool:
    """Whether all steps of a stretch use the same weights, and no other weight that learns comes before them."""
    if isinstance(flow, Iteration):
        return True
    if not isinstance(flow, Flow):
        return False
    first, last = stretch
    used = {frozenset(w.path for w in step.weights) for step in measurement.steps[first : last + 1]}
    if len(used) != 1 or not next(iter(used)):
        return False
    known = {w.path for step in measurement.steps[first:] for w in step.weights}
    return all(path in known for path, p in flow.model.named_parameters() if p.requires_grad)
