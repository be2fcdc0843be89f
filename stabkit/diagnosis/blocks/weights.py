"""The parameters that a step uses, in numbers that can be compared between blocks of different width."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.tracing import Flow, Step
from stabkit.tracing.recording.recorder import Call
from stabkit.vocabulary import norm_of

_EXACT = 256  # smaller side up to which an effective rank is computed and not estimated
_SIGNS = 16
_LEAST_SCALE = 1e-5  # of the largest entry: its fourth power, and that of the norm of a matrix, are still normal
_CHUNK = 1 << 16  # entries that are made float64 at a time: they stay in the cache


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
        fixed: whether it is held fixed in a model that trains others: a stencil, a filter bank.
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
    fixed: bool = False


class Weights:
    """The parameters of a flow by step; what all steps ask of the model is looked up once."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._called = {call.path for call in flow.recorded.recording.calls}
        modules = flow.model.modules()
        self._trains = any(p.requires_grad for p in flow.model.parameters())
        self._tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)}

    def of(self, step: Step) -> tuple[Weight, ...]:
        """The parameters of the modules that ran in a step, and of modules below them that never run on their own."""
        calls = calls_of(self._flow, step)
        last_norm = max((call.start for call in calls if norm_of(call.module)), default=-1)
        found: dict[str, Weight] = {}
        for call in calls:
            for path, module_path, module, parameter, values in _owned(call, self._called):
                if path not in found:
                    tied = id(parameter) in self._tables
                    fixed = self._trains and not parameter.requires_grad
                    normed = last_norm >= call.stop
                    found[path] = describe(path, module_path, module, values, normed=normed, tied=tied, fixed=fixed)
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


def step_of(flow: Flow, path: str) -> int:
    """The step in which a module runs first."""
    for step in flow.steps:
        if step.module_path and (path == step.module_path or path.startswith(f"{step.module_path}.")):
            return step.index
    for call in flow.recorded.recording.calls:
        if call.path == path:
            position = flow.recorded.graph.position(call.start)
            return next((s.index for s in flow.steps if position < s.target.position), len(flow.steps) - 1)
    return 0


def norms_in(flow: Flow, step: Step) -> int:
    """How many norms run in a step."""
    return sum(norm_of(call.module) is not None for call in calls_of(flow, step))


def ends_in_norm(flow: Flow, step: Step) -> bool:
    """Whether the last module that runs in a step is a norm."""
    calls = [call for call in calls_of(flow, step) if not list(call.module.children())]
    return bool(calls) and norm_of(calls[-1].module) is not None


def _owned(call: Call, called: set[str]) -> Iterator[tuple[str, str, nn.Module, nn.Parameter, Tensor]]:
    """Parameters of a module that ran, and of those below it that the recording never saw running.

    Each with its path, that of its module, the module, and its values.
    """
    for name, module in call.module.named_modules():
        path = ".".join(filter(None, (call.path, name)))
        if name and path in called:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or parameter.numel() == 0:
                continue
            values = values_of(module, key)
            if values is not None:
                yield ".".join(filter(None, (path, key))), path, module, parameter, values


def describe(path: str, module_path: str, module: nn.Module, parameter: Tensor, **known: bool) -> Weight:
    """One parameter in comparable numbers, with what is ``known`` of it: whether it is normed, tied or fixed."""
    data = parameter.detach()
    mean, square = _moments(data)
    finite = math.isfinite(square) or bool(data.isfinite().all())
    rms = math.sqrt(square)
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
    rank = log_rank(data) if kind == "matrix" and finite and rms > 0 else math.nan
    return Weight(path, module_path, cls, role_of(path), kind, gains, unit, mean, finite, log_rank=rank, **known)


def _moments(data: Tensor) -> tuple[float, float]:
    """Mean (its real part) and mean square of the entries, summed in float64 without a copy of the whole."""
    flat = data.reshape(-1)
    total = square = 0.0
    for part in torch.split(flat, _CHUNK):
        wide = (torch.view_as_real(part) if part.is_complex() else part).to(torch.float64)
        total += float(wide[..., 0].sum() if part.is_complex() else wide.sum())
        square += float(torch.dot(wide.flatten(), wide.flatten()))
    return total / flat.numel(), square / flat.numel()


def log_rank(data: Tensor) -> float:
    """Log of the effective rank of a matrix, as a share of the largest that its shape allows.

    Exact up to a smaller side of 256; beyond, |W W^T|_F^2 is estimated from 16 random signs.

    Example:
        >>> log_rank(torch.eye(4)), round(math.exp(log_rank(torch.ones(4, 9))), 6)
        (0.0, 0.25)
    """
    W = data.flatten(1)
    # a share of singular values needs no more digits than the weights have
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if min(W.shape) == 1:
        return math.nan
    low, high = torch.aminmax(torch.view_as_real(W) if W.is_complex() else W)
    largest = max(-float(low), float(high))
    if not _LEAST_SCALE < largest < 1 / _LEAST_SCALE:  # fourth powers would leave the range of the dtype
        W = W / largest
    W = W if W.shape[0] <= W.shape[1] else W.mH
    if W.shape[0] <= _EXACT:
        fourth = (W @ W.mH).abs().square().sum()
    else:
        signs = torch.randint(0, 2, (W.shape[0], _SIGNS), generator=torch.Generator(W.device).manual_seed(0))
        fourth = (W @ (W.mH @ (2.0 * signs - 1).to(W))).abs().square().sum() / _SIGNS
    return float(4 * torch.linalg.vector_norm(W).double().log() - fourth.double().log()) - math.log(W.shape[0])


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


def values_of(module: nn.Module, name: str) -> Tensor | None:
    """The values of a module's own parameter, also when they are offloaded; None where nobody can say.

    ``accelerate`` leaves parameters on the meta device and fetches them in a hook of the module.

    Args:
        module: that the parameter belongs to.
        name: what the tensor is called in that module.

    Example:
        >>> values_of(nn.Linear(3, 2), "weight").shape
        torch.Size([2, 3])
    """
    parameter = module._parameters[name]
    if parameter is None or not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        stored = getattr(hook, "weights_map", None)
        if isinstance(stored, Mapping) and name in stored:
            found: Tensor = stored[name]
            return found
    return None


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
