"""The parameters that a step uses, in numbers that can be compared between blocks of different width."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from stabkit.tracing import Flow, Step
from stabkit.tracing.offloading import values_of
from stabkit.tracing.recording import Call

_EXACT = 256  # smaller side up to which an effective rank is computed and not estimated
_SIGNS = 16


@dataclass(frozen=True)
class Weight:
    """One parameter of a step.

    Attributes:
        path: as in ``model.named_parameters()``.
        module_path: the module that owns it.
        module_class: the class of that module.
        role: the path without the numbers that tell blocks apart; the peers of a weight have the same role.
        kind: ``"matrix"``, ``"scale"`` (of a norm, or a vector of step sizes) or ``"bias"``.
        gains: log of the gain that its size means, by the conventions of fan-in, fan-out and their mean for a matrix
            (sigma sqrt(fan)); log of its root mean square otherwise. -inf for zeros, NaN where it is not finite.
        unit: what the first gain divides by its size: sqrt(fan-in) for a matrix, 1 otherwise.
        mean: mean of its entries.
        finite: whether all entries are.
        normed: whether a norm runs after its module in the step, which takes its size out of the states again.
        tied: whether it is the table of an embedding as well: its size is then that of embeddings.
        log_rank: log of the effective rank of a matrix over its largest possible one; NaN where there is none to speak
            of. The effective rank is the participation ratio of the squared singular values, |W|_F^4 / |W W^T|_F^2.
    """

    path: str
    module_path: str
    module_class: str
    role: str
    kind: str
    gains: tuple[float, ...]
    unit: float
    mean: float
    finite: bool
    normed: bool = False
    log_rank: float = math.nan
    tied: bool = False


def weights_of(flow: Flow, step: Step) -> tuple[Weight, ...]:
    """The parameters of the modules that ran in a step, and of modules below them that never run on their own."""
    called = {call.path for call in flow.recorded.recording.calls}
    calls = calls_of(flow, step)
    tables = {id(m.weight) for m in flow.model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    last_norm = max((call.start for call in calls if is_norm(call.module)), default=-1)
    found: dict[str, Weight] = {}
    for call in calls:
        for weight, parameter in _owned(call, called):
            normed = last_norm >= call.stop
            found.setdefault(weight.path, replace(weight, normed=normed, tied=id(parameter) in tables))
    return tuple(found.values())


def calls_of(flow: Flow, step: Step) -> list[Call]:
    """The calls of modules that began and ended in a step, in the order of their beginnings."""
    clock = flow.recorded.graph.clock
    start, stop = step.source.position, step.target.position
    last_before = clock[start - 1] if start > 0 else -1
    first_after = clock[stop] if stop < len(clock) else math.inf
    calls = flow.recorded.recording.calls
    # found by bisection: to look at all calls at every step would cost the square of the depth
    low = bisect.bisect_right(calls, last_before, key=lambda call: call.start)
    high = bisect.bisect_right(calls, first_after, key=lambda call: call.start)
    # a container of several steps lies in none of them
    return [call for call in calls[low:high] if call.stop <= first_after]


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by the name of its class."""
    return "Norm" in type(module).__name__


def norms_in(flow: Flow, step: Step) -> int:
    """How many norms run in a step."""
    return sum(is_norm(call.module) for call in calls_of(flow, step))


def ends_in_norm(flow: Flow, step: Step) -> bool:
    """Whether the last module that runs in a step is a norm."""
    calls = [call for call in calls_of(flow, step) if not list(call.module.children())]
    return bool(calls) and is_norm(calls[-1].module)


def _owned(call: Call, called: set[str]) -> Iterator[tuple[Weight, nn.Parameter]]:
    """Parameters of a module that ran, and of those below it that the recording never saw running."""
    for name, module in call.module.named_modules():
        path = ".".join(filter(None, (call.path, name)))
        if name and path in called:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or parameter.numel() == 0:
                continue
            values = values_of(module, key)
            if values is not None:
                yield describe(".".join(filter(None, (path, key))), path, module, values), parameter


def describe(path: str, module_path: str, module: nn.Module, parameter: Tensor) -> Weight:
    """One parameter in comparable numbers."""
    data = parameter.detach()
    finite = bool(data.isfinite().all())
    rms = float(data.to(torch.float64).abs().square().mean().sqrt())
    log = math.log(rms) if rms > 0 and math.isfinite(rms) else (-math.inf if rms == 0 else math.nan)
    kind = "bias" if "bias" in path.rsplit(".", 1)[-1] else "matrix" if data.dim() > 1 else "scale"
    gains: tuple[float, ...] = (log,)
    unit = 1.0
    if kind == "matrix":
        field = math.prod(data.shape[2:])
        fans = [data.shape[1] * field, data.shape[0] * field]
        if type(module).__name__ == "Conv1D" or "Transpose" in type(module).__name__:
            fans.reverse()  # these hold their inputs first
        unit = math.sqrt(max(fans[0], 1))
        gains = tuple(log + 0.5 * math.log(max(fan, 1)) for fan in (*fans, sum(fans) / 2))
    cls = type(module).__name__
    mean = float(data.double().mean().real)
    rank = log_rank(data) if kind == "matrix" and finite and rms > 0 else math.nan
    return Weight(path, module_path, cls, role_of(path), kind, gains, unit, mean, finite, log_rank=rank)


def log_rank(data: Tensor) -> float:
    """Log of the effective rank of a matrix, as a share of the largest that its shape allows.

    Exact up to a smaller side of 256; beyond, |W W^T|_F^2 is estimated from 16 random signs.

    Example:
        >>> log_rank(torch.eye(4)), round(math.exp(log_rank(torch.ones(4, 9))), 6)
        (0.0, 0.25)
    """
    W = data.flatten(1).to(torch.complex128 if data.is_complex() else torch.float64)
    W = W / W.abs().max()
    W = W if W.shape[0] <= W.shape[1] else W.mH
    if W.shape[0] == 1:
        return math.nan
    if W.shape[0] <= _EXACT:
        fourth = (W @ W.mH).abs().square().sum()
    else:
        signs = torch.randint(0, 2, (W.shape[0], _SIGNS), generator=torch.Generator(W.device).manual_seed(0))
        fourth = (W @ (W.mH @ (2.0 * signs - 1).to(W))).abs().square().sum() / _SIGNS
    return float(2 * W.abs().square().sum().log() - fourth.log()) - math.log(W.shape[0])


@lru_cache(maxsize=4096)
def role_of(path: str) -> str:
    """What the numbers of blocks leave of a path; a layer inside a numbered block keeps its own number.

    Example:
        >>> role_of("layer2.0.conv1.weight"), role_of("net.4.weight"), role_of("blocks.3.mlp.0.weight")
        ('layer*.*.conv1.weight', 'net.*.weight', 'blocks.*.mlp.0.weight')
    """
    *parents, module, name = ["", "", *path.split(".")][-max(2, path.count(".") + 1) :]
    above = [re.sub(r"\d+", "*", part) for part in parents]
    own = "*" if module.isdigit() and "*" not in "".join(above) else module
    return ".".join([*above, own, name]).lstrip(".")
