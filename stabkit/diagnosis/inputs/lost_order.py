"""Models that do not see the order of what they are given, where the targets depend on it.

Attention, means and sums over positions give the same for the same tokens in any order, unless something tells them
apart. That is right for sets. It is wrong where samples that hold the same tokens have different targets: they get the
same output, and the loss has a floor, which is computed. Where no two samples hold the same tokens, positions are
added on a copy, and training says whether they matter.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.losses.loud_logits import cross_entropies
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above, training_pass

_ROUNDING = 1e-5  # of the size of an output: sums in another order
_OF_CHANCE = 0.2  # of the loss of equal chances: a floor from which logits are held in too narrow a range
_OF_VARIANCE = 0.05  # of the variance of the targets, from which what lies out of reach is no noise
_MOST = 4096  # samples or tokens that are compared
_STEPS = 50  # of a trial, and a fifth of that for models of more parameters than these
_SMALL = 100_000
_FALL = 0.2  # of the first loss: what positions must bring
_LEFT = 0.5  # of the first loss: what a model that learns what it can leaves less of, be it by heart
_TIMES = 1.5  # by how much the fall of the loss must be larger with them
_REFERENCE = "Vaswani et al., Attention is all you need, 2017, section 3.5; Zaheer et al., Deep sets, 2017"


def lost_order_findings(flow: Flow, loss: Any, call: ForwardPass, done: TrainingPass) -> list[Finding]:
    """A finding where the order of tokens does not reach the output.

    Args:
        flow: the traced pass.
        loss: a callable on the output that returns a scalar.
        call: the pass as training makes it.
        done: its loss, on the graph.
    """
    attention, outputs = _attention(call, done), _outputs(done.output)
    for axis in (1, 0):
        tokens = _tokens(call, axis)
        if tokens is None or not outputs or any(t.dim() == 0 or len(t) != len(tokens) for t in outputs):
            continue
        if attention is None and not _several(_by_content(tokens)):
            continue
        if _is_blind(call, axis, tokens.shape[1]):
            return _judged(flow, loss, call, done, tokens, attention)
    return _of_every_token(flow, call, done, attention)


def _of_every_token(flow: Flow, call: ForwardPass, done: TrainingPass, attention: str | None) -> list[Finding]:
    """Outputs for every token that follow it wherever it is put, where equal tokens of a sample have other targets."""
    tokens, outputs = _tokens(call, 1), _outputs(done.output)
    if tokens is None or attention is None or any(t.dim() < 2 or t.shape[:2] != tokens.shape[:2] for t in outputs):
        return []
    samples = list(zip(_by_content(tokens), tokens.cpu().tolist(), strict=True))
    content: list[Hashable] = [(whole, tuple(token)) for whole, sample in samples for token in sample]
    order: list[Hashable] = [(place, at) for place in _by_order(tokens) for at in range(tokens.shape[1])]
    floor = next(iter(_floors(done, content, order)), None)
    if floor is None or not floor.least > floor.limit or not _is_blind(call, 1, tokens.shape[1], follows=True):
        return []
    words = (
        f"what is returned for a token is the same, to rounding, wherever in its sample it stands: {floor.shared} of "
        f"{len(content)} tokens are the same as others of their sample with another target, so that the {floor.name} "
        f"cannot fall below {floor.least:.3g}; {floor.without} {floor.scale:.3g}"
    )
    return [_finding(flow, "warning", attention, words, floor)]


def _judged(
    flow: Flow, loss: Any, call: ForwardPass, done: TrainingPass, tokens: Tensor, attention: str | None
) -> list[Finding]:
    """What follows from being blind to order, for these samples and their targets."""
    assert done.loss is not None
    floor = next(iter(_floors(done, _by_content(tokens), _by_order(tokens))), None)
    words = "the output is the same, to rounding, for the tokens of a sample in any order"
    sure = floor is not None and floor.least > floor.limit
    if floor is not None and sure:
        words += (
            f": {floor.shared} of {len(tokens)} samples hold the same tokens as others with another target, so that "
            f"the {floor.name} cannot fall below {floor.least:.3g}; {floor.without} {floor.scale:.3g}"
        )
    elif attention is None:
        return []
    better, tried = _trial(call, loss, done, tokens.shape[1])
    return [_finding(flow, "warning" if sure or better else "info", attention or "", words + tried, floor)]


def _finding(flow: Flow, severity: str, path: str, evidence: str, floor: _Floor | None) -> Finding:
    return Finding(
        kind="order",
        severity=severity,
        steps=(step_of(flow, path) if path else 0,),
        module_path=path,
        confidence=1.0,
        evidence=evidence,
        remedy="tell positions apart: add a positional embedding or encoding to what goes into "
        f"{path or 'the first layer'}, or read the order by a convolution or a recurrence"
        if severity == "warning"
        else "none is needed where the input is a set; otherwise add a positional embedding or encoding",
        reference=_REFERENCE,
        numbers={} if floor is None else {"floor": floor.least, "scale": floor.scale},
    )


def _attention(call: ForwardPass, done: TrainingPass) -> str | None:
    """The first module that attends; empty for attention in the code of the model, None without any."""
    modules = dict(call.module.named_modules())
    ran = [c.path for c in done.calls]
    found = next((path for path in ran if isinstance(modules.get(path), nn.MultiheadAttention)), None)
    if found is not None or done.loss is None:
        return found
    inside = any(operation(node).startswith("ScaledDotProduct") for node in nodes_above(done.loss))
    return "" if inside else None


def _tokens(call: ForwardPass, axis: int) -> Tensor | None:
    """What is given at every position of every sample, as ``(samples, positions, numbers)``."""
    given = [t for _, t in named_tensors([list(call.inputs), call.kwargs]) if t.dim() > 1 and t.layout == torch.strided]
    if not given or given[0].dim() > 3 or (given[0].dim() == 2 and given[0].is_floating_point()):
        return None
    lead = given[0].shape[:2]
    if min(lead) < 2 or max(lead) > _MOST:
        return None
    parts = [t.detach().double().reshape(*lead, -1) for t in given if t.shape[:2] == lead and t.dim() <= 3]
    joined = torch.cat(parts, 2)
    return joined.transpose(0, 1) if axis == 0 else joined


def _by_content(tokens: Tensor) -> list[Hashable]:
    """For every sample what it holds, whatever the order."""
    sums = tokens.sum(1)
    if len(set(map(tuple, sums.round(decimals=4).tolist()))) == len(
        sums
    ):  # as good as always of numbers that were measured
        return list(range(len(tokens)))
    return [tuple(sorted(map(tuple, sample))) for sample in tokens.cpu().tolist()]


def _by_order(tokens: Tensor) -> list[Hashable]:
    """For every sample what it holds, in its order."""
    return [tuple(map(tuple, sample)) for sample in tokens.cpu().tolist()]


def _several(keys: Sequence[Hashable]) -> bool:
    return len(set(keys)) < len(keys)


def _is_blind(call: ForwardPass, axis: int, count: int, *, follows: bool = False) -> bool:
    """Whether the output is the same with all positions in another order; or follows them into that order."""
    first = next(t for _, t in named_tensors([list(call.inputs), call.kwargs]) if t.dim() > 1)
    lead = first.shape[:2]
    order = torch.arange(count).roll(1).flip(0)

    def permuted(t: Tensor) -> Tensor:
        return t.index_select(axis, order.to(t.device)) if t.dim() > 1 and t.shape[:2] == lead else t

    plain, other = (_outputs(evaluated(call, change).output) for change in (None, permuted))
    if not plain or [t.shape for t in plain] != [t.shape for t in other]:
        return False
    if follows:
        plain = [t.index_select(axis, order.to(t.device)) for t in plain]
    return all(
        float((a - b).abs().max()) <= _ROUNDING * float(a.abs().max()) for a, b in zip(plain, other, strict=True)
    )


def _outputs(output: Any) -> list[Tensor]:
    return [t.detach().double() for _, t in named_tensors(output) if t.is_floating_point() and t.numel()]


@dataclass(frozen=True)
class _Floor:
    """What a loss cannot get below where samples of the same tokens get the same output.

    Attributes:
        least: the floor.
        scale: what the loss is without a model.
        limit: from which the floor is no noise.
        shared: samples that hold what others with another target hold.
        name: of the loss.
        without: what the scale is, in words.
    """

    least: float
    scale: float
    limit: float
    shared: int
    name: str
    without: str


def _floors(done: TrainingPass, content: list[Hashable], order: list[Hashable]) -> Iterator[_Floor]:
    """Floors of the parts of a loss whose targets are one, or one row, for each sample.

    What samples that are the same in every position cost is no matter of their order, and is taken off.
    """
    assert done.loss is not None
    for entropy in cross_entropies(done.loss):
        if len(entropy.labels) == len(content):
            labels = entropy.labels.reshape(len(content), -1).double()
            least = _within(labels, content, _entropy) - _within(labels, order, _entropy)
            shared = _shared(labels, content, order)
            limit = _OF_CHANCE * entropy.chance
            yield _Floor(least, entropy.chance, limit, shared, "cross entropy", "equal chances cost")
    targets = [(r.targets, False) for r in regressions(done)] + [(t, True) for t in _binary_targets(done)]
    for target, binary in targets:
        if target.dim() > 1 and target.shape[0] * target.shape[1] == len(content):  # one for every token
            target = target.flatten(0, 1)
        if target.dim() == 0 or len(target) != len(content):
            continue
        rows = target.double().reshape(len(content), -1)
        measure = _binary_entropy if binary else _variance
        least = _within(rows, content, measure) - _within(rows, order, measure)
        scale = math.log(2.0) if binary else float((rows - rows.mean(0)).square().mean())
        name, without = (
            ("cross entropy", "equal chances cost")
            if binary
            else ("mean squared error", "the mean of the targets alone leaves")
        )
        limit = (_OF_CHANCE if binary else _OF_VARIANCE) * scale
        yield _Floor(least, scale, limit, _shared(rows, content, order), name, without)


def _binary_targets(done: TrainingPass) -> Iterator[Tensor]:
    assert done.loss is not None
    for each in nodes_above(done.loss):
        node: Any = each
        if operation(node).startswith("BinaryCrossEntropy") and isinstance(node._saved_target, Tensor):
            yield node._saved_target.detach()


def _groups(keys: list[Hashable]) -> list[list[int]]:
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        found[key].append(index)
    return list(found.values())


def _within(targets: Tensor, keys: list[Hashable], measure: Callable[[Tensor], float]) -> float:
    """The mean over samples of what their group leaves at the best."""
    return sum(len(group) * measure(targets[group]) for group in _groups(keys)) / len(keys)


def _variance(rows: Tensor) -> float:
    return float((rows - rows.mean(0)).square().mean())


def _entropy(labels: Tensor) -> float:
    shares = [count / len(labels) for count in Counter(map(tuple, labels.tolist())).values()]
    return -sum(share * math.log(share) for share in shares)


def _binary_entropy(rows: Tensor) -> float:
    p = rows.mean(0)
    return -float((torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean())


def _shared(targets: Tensor, content: list[Hashable], order: list[Hashable]) -> int:
    """How many samples are in a group of other orders and other targets."""
    several = [g for g in _groups(content) if len({order[i] for i in g}) > 1]
    return sum(len(group) for group in several if bool((targets[group] != targets[group[0]]).any()))


def _trial(call: ForwardPass, loss: Any, done: TrainingPass, count: int) -> tuple[bool, str]:
    """Whether training is clearly better with positions, and what it says."""
    assert done.loss is not None
    first = float(done.loss.detach())
    place = _embedded(call, count)
    if not place or not first > 0:
        return False, ""
    told = replace(call, model=_with_positions(call, place))
    steps = _STEPS if sum(p.numel() for p in call.module.parameters()) <= _SMALL else _STEPS // 5
    begun = training_pass(told, loss, differentiate=False).loss
    plain, treated = (left_after(each, loss, [adam(rate) for rate in RATES], steps=steps) for each in (call, told))
    if plain is None or treated is None or begun is None:
        return False, ""
    ends = plain * first, treated * float(begun.detach())
    words = (
        f"; {steps} steps of Adam take the loss from {first:.3g} to {ends[0]:.3g} as it is, to {ends[1]:.3g} with "
        f"sines of the position added behind {place}"
    )
    fall = first - ends[0], first - ends[1]
    better = ends[0] > _LEFT * first and fall[1] - fall[0] > _FALL * first and fall[1] > _TIMES * fall[0]
    return better, words


def _embedded(call: ForwardPass, count: int) -> str:
    """The first module whose result has one vector for each position; empty without one."""
    made: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out, path=path: made.append(path) if _is_sequence(out, count) else None
        )
        for path, module in call.module.named_modules()
        if path
    ]
    try:
        evaluated(call)
    finally:
        for hook in hooks:
            hook.remove()
    return made[0] if made else ""


def _is_sequence(out: Any, count: int) -> bool:
    return isinstance(out, Tensor) and out.is_floating_point() and out.dim() == 3 and count in out.shape[:2]


def _with_positions(call: ForwardPass, place: str) -> Callable[..., Any]:
    """The model with sines of the position added to what one module returns, of the size that this has."""

    def add(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        along = 1 if out.shape[1] != len(out) or call.inputs[0].shape[0] == len(out) else 0
        at = torch.arange(out.shape[along], dtype=torch.float64)[:, None]
        rates = 10_000.0 ** -(2 * torch.arange(out.shape[2]).div(2, rounding_mode="floor") / out.shape[2])
        angle = at * rates + math.pi / 2 * (torch.arange(out.shape[2]) % 2)
        encoding = (2**0.5 * angle.sin()).to(out) * out.detach().square().mean().sqrt()
        return out + (encoding if along == 1 else encoding.unsqueeze(1))

    def model(*inputs: Any, **kwargs: Any) -> Any:
        hook = dict(call.module.named_modules())[place].register_forward_hook(add)
        try:
            return call.model(*inputs, **kwargs)
        finally:
            hook.remove()

    return model
