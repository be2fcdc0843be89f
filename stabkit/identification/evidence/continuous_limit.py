"""Whether a residual network may be read as an ordinary differential equation, as a stochastic one, or as neither."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stabkit import integrators
from stabkit.errors import TraceError
from stabkit.identification.method import by_step, identify
from stabkit.identification.names.single import order_of
from stabkit.identification.record import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.results import Result
from stabkit.tracing import Flow, Step

_FEWEST = 4
_PERSISTENT = 0.5  # a field that turns by less than 60 degrees from layer to layer
_INDEPENDENT = 0.25
_SMALL_CHANGE = 0.25  # of the distance that the state travels
_AROUND = 1.6  # factor about L^-1/2 within which a path is that of a random walk
Map = Callable[[Tensor], Tensor]
#: Explicit Runge-Kutta methods of orders 1 to 4.
_SOLVERS = ("forward_euler", "midpoint", "kutta3", "rk4")
HIGHEST_ORDER = len(_SOLVERS)


@dataclass(frozen=True)
class ContinuousLimit(Result):
    """What speaks for and against a differential equation behind a run of residual steps.

    Attributes:
        label: ``"ODE-like"`` (the field persists, and an equally accurate solver gives nearly the same output),
            ``"SDE-like"`` (fields are independent of each other, and the path is as straight as a random walk), or
            ``"neither"``.
        steps: first and last step of the run.
        persistence: mean cosine between the fields of neighbouring steps; 1 for a smooth dependence on depth, about 0
            for independent weights.
        persistence_error: its standard error over layers.
        same_point: whether both fields were evaluated at one point; otherwise each at its own state.
        straightness: ``||x_L - x_0|| / sum ||x_{l+1} - x_l||``, mean over samples; 1 for a straight path.
        random_walk: what independent increments would give: ``L^-1/2``.
        solver_swaps: change of the last state when the read method is replaced by another of its order, as a fraction
            of the distance travelled: ``"paired"`` takes two steps at once, ``"half steps"`` each step in two halves.
            None where the blocks cannot be called by themselves.
        notes: what could not be measured and why.
    """

    label: str
    steps: tuple[int, int]
    persistence: float
    persistence_error: float
    same_point: bool
    straightness: float
    random_walk: float
    solver_swaps: dict[str, float] | None
    notes: tuple[str, ...]


def continuous_limit(flow: Flow, identifications: Sequence[Identification] | None = None) -> ContinuousLimit:
    """Persistence, straightness and solver-swap test of the longest run of steps x' = x + f(x).

    Sources: Cohen, Cont, Rossier and Xu, ICML 2021 (trained networks may be either or neither); Marion, Fermanian,
    Biau and Vert 2022 (independent weights have a stochastic limit); Ott, Katiyar, Hennig and Tiemann, ICLR 2021
    (replacing the solver breaks networks that are no differential equation).

    Args:
        flow: a traced model.
        identifications: from `identify`; read anew when not given.

    Raises:
        TraceError: the flow has no run of at least four such steps.

    Example:
        >>> import torch, stabkit
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = torch.nn.Linear(64, 64)
        ...     def forward(self, x):
        ...         return x + torch.tanh(self.f(x)) / 6
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*(Block() for _ in range(36)))
        >>> continuous_limit(stabkit.trace(model, torch.randn(4, 64))).label
        'SDE-like'
    """
    records = by_step(identify(flow, checks=False) if identifications is None else identifications, len(flow.steps))
    run = _longest_run(flow, records)
    if len(run) < _FEWEST:
        raise TraceError(
            f"the longest run of steps x + f(x) has {len(run)} steps; at least {_FEWEST} are needed to tell whether "
            "they follow a differential equation"
        )
    states = [flow.states[run[0].index].flatten(), *(flow.states[step.index + 1].flatten() for step in run)]
    moves = [after - before for before, after in itertools.pairwise(states)]
    length = sum(float(move.double().norm(dim=1).mean()) for move in moves)
    straightness = _mean([(states[-1] - states[0]).double().norm(dim=1) / _path_length(moves)])
    notes: list[str] = []
    with flow.forward_pass.kept(), torch.no_grad():
        blocks = _callable_blocks(flow, run)
        if blocks is None:
            notes.append("blocks cannot be called by themselves: fields are compared along the path, no solver swap")
            cosines = [_cosine(a, b) for a, b in itertools.pairwise(moves)]
            swaps = None
        else:
            points = [flow.states[step.index].tensors[0] for step in run]
            cosines = [_cosine(f(x) - x, g(x) - x) for f, g, x in zip(blocks, blocks[1:], points, strict=False)]
            order = min(_order(records[step.index]) for step in run)
            swaps = solver_swaps(blocks, points[0], flow.states[run[-1].index + 1].tensors[0], order)
    if length == 0.0:
        notes.append("the state does not move: every branch is zero")
    persistence = sum(cosines) / len(cosines)
    spread = math.sqrt(sum((c - persistence) ** 2 for c in cosines) / max(1, len(cosines) - 1))
    walk = len(run) ** -0.5
    return ContinuousLimit(
        label=_label(persistence, straightness, walk, swaps),
        steps=(run[0].index, run[-1].index),
        persistence=persistence,
        persistence_error=spread / math.sqrt(len(cosines)),
        same_point=blocks is not None,
        straightness=straightness,
        random_walk=walk,
        solver_swaps=swaps,
        notes=tuple(notes),
    )


def _label(persistence: float, straightness: float, walk: float, swaps: dict[str, float] | None) -> str:
    stays = swaps is None or max(swaps.values()) <= _SMALL_CHANGE
    if persistence >= _PERSISTENT and stays:
        return "ODE-like"
    if abs(persistence) <= _INDEPENDENT and walk / _AROUND <= straightness <= walk * _AROUND:
        return "SDE-like"
    return "neither"


def _longest_run(flow: Flow, records: Sequence[Identification]) -> tuple[Step, ...]:
    """The longest run of steps with an identity skip between states of one tensor and one shape."""
    best: list[Step] = []
    current: list[Step] = []
    for step, record in zip(flow.steps, records, strict=True):
        single = len(step.source.values) == len(step.target.values) == 1
        follows = not current or step.source.shapes == current[-1].target.shapes
        if not (single and record.skip == 1.0 and record.name != "no branch" and not record.after):
            current = []
            continue
        current = [*current, step] if follows else [step]
        best = max(best, current, key=len)
    return tuple(best)


def _order(record: Identification) -> int:
    """The order of a Runge-Kutta method of one field; everything else is as accurate as Euler's."""
    method = record.method
    if not record.shared_weights or not isinstance(method, GeneralLinearMethod) or method.n_fields > 1:
        return 1
    return min(max(1, order_of(method)), HIGHEST_ORDER)


def _callable_blocks(flow: Flow, run: Sequence[Step]) -> list[Map] | None:
    """The blocks as maps of the state, if calling each on its recorded state gives the next one."""
    modules = dict(flow.model.named_modules())
    found: list[Map] = []
    for step in run:
        module = modules.get(step.module_path)
        if module is None or not _takes_one_tensor(module):
            return None
        source, target = (flow.states[i].tensors[0] for i in (step.index, step.index + 1))
        out = _called(module, source)
        block = None if out is None or out.shape != target.shape else _as_block(module, source, target, out)
        if block is None:
            return None
        found.append(block)
    return found


def _as_block(module: nn.Module, source: Tensor, target: Tensor, out: Tensor) -> Map | None:
    """The module itself when it gives the next state; x + h times it when it is the field of an Euler step."""
    if torch.allclose(out, target, rtol=1e-3, atol=1e-5 * float(target.abs().max())):
        return module
    size = float(out.double().square().sum())
    h = float((out * (target - source)).double().sum()) / size if size > 0 else 0.0
    if h == 0.0 or not torch.allclose(h * out, target - source, rtol=1e-3, atol=1e-5 * float((h * out).abs().max())):
        return None
    return lambda x: x + h * module(x)


def _takes_one_tensor(module: nn.Module) -> bool:
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return len(required) <= 1


def _called(module: nn.Module, x: Tensor) -> Tensor | None:
    """The result of calling a block on the state alone; None when it wants more than its signature says."""
    try:
        out = module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None  # a mask or rotary angles that its model always gives it
    return out if isinstance(out, Tensor) else None


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(1).double(), b.flatten(1).double()
    norms = a.norm(dim=1) * b.norm(dim=1)
    return float(((a * b).sum(dim=1) / norms.clamp_min(1e-300)).mean())


def _path_length(moves: Sequence[Tensor]) -> Tensor:
    return torch.stack([move.double().norm(dim=1) for move in moves]).sum(dim=0).clamp_min(1e-300)


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.cat(list(values)).mean())


def solver_swaps(blocks: Sequence[Map], start: Tensor, end: Tensor, order: int = 1) -> dict[str, float]:
    """The change of the last state under two other solvers of the same order, as a fraction of the distance travelled.

    A network whose output changes much under an equally accurate solver is no discretised differential equation (Ott,
    Katiyar, Hennig and Tiemann, ICLR 2021). The field of a block comes from the block as a map: of an Euler step it is
    f = B - 1; of a method of order p the logarithm of the map, to that order,

        f = (B - 1) - (B - 1)^2 / 2 + (B - 1)^3 / 3 - ...,

    with powers as forward differences along x, B x, B B x, ...: the derivative at the first of equally spaced points.

    Args:
        blocks: the steps as maps of the state.
        start: the first state.
        end: the last one.
        order: the order of the method that the blocks are, 1 to 4.

    Returns:
        ``"paired"``: one step for two blocks, with the mean of their fields; ``"half steps"``: two for each.
    """
    fields = [_field(block, order) for block in blocks]
    paired = start
    for f, g in zip(fields[::2], [*fields[1::2], None], strict=False):
        paired = _step(f, paired, 1.0, order) if g is None else _step(_mean_map(f, g), paired, 2.0, order)
    halves = start
    for f in fields:
        halves = _step(f, _step(f, halves, 0.5, order), 0.5, order)
    travelled = float((end - start).double().norm())
    changes = {"paired": paired, "half steps": halves}
    return {name: float((x - end).double().norm()) / travelled if travelled > 0 else 0.0 for name, x in changes.items()}


def _field(block: Map, order: int) -> Map:
    # weights of x, B x, B B x, ...: (-1)^(k+1)/k of the k-th forward difference
    weights = np.zeros(order + 1)
    for k in range(1, order + 1):
        for j in range(k + 1):
            weights[j] += (-1) ** (k + 1) / k * math.comb(k, j) * (-1) ** (k - j)

    def field(x: Tensor) -> Tensor:
        total = float(weights[0]) * x
        for weight in weights[1:]:
            x = block(x)
            total = total + float(weight) * x
        return total

    return field


def _mean_map(f: Map, g: Map) -> Map:
    return lambda x: (f(x) + g(x)) / 2


def _step(field: Map, x: Tensor, h: float, order: int) -> Tensor:
    method = integrators.named(_SOLVERS[order - 1])
    stages: list[Tensor] = []
    for row in method.A:
        y = x
        for a, k in zip(row, stages, strict=False):
            y = y + h * float(a) * k if a else y
        stages.append(field(y))
    for b, k in zip(method.B[0], stages, strict=True):
        x = x + h * float(b) * k
    return x
