"""Models that do not see the order of what they are given, where the targets depend on it.

Attention, means and sums over positions give the same for the same tokens in any order, unless something tells them
apart. That is right for sets, of which nothing is told. It is wrong where samples that hold the same tokens have
different targets: they get the same output, and the loss has a floor, which is computed. Where no two samples hold the
same tokens, positions are added on a copy, and training says whether they matter; where a model learns by heart,
whether they do more than the same positions in another order in every sample.

A model that reads its output at the last or at the first position sees what stands there, and may be blind to the order
of all others.
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
from stabkit.diagnosis.inputs.added_positions import Layout
from stabkit.diagnosis.losses.loud_logits import cross_entropies
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.remedies.applying import is_small
from stabkit.diagnosis.remedies.held_out import learnt
from stabkit.diagnosis.remedies.moved_weights import moved_weights
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.diagnosis.remedies.usual_training import ADAM, RATES, adam, left_after
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above, training_pass

_ROUNDING = 1e-5  # of the size of an output: sums in another order
_OF_CHANCE = 0.2  # of the loss of equal chances: a floor from which logits are held in too narrow a range
_OF_VARIANCE = 0.05  # of the variance of the targets, from which what lies out of reach is no noise
_BELOW = 0.99  # of a floor: what no rounding of a loss that has come down to it explains
_MOST = 4096  # samples or tokens that are compared
_MOST_NUMBERS = 2**24  # of all tokens: 128 MiB of doubles, which are told apart in a second or two
_STAYS, _FOLLOWS = "stays", "follows"  # what an output does where positions change places
_BUT = {None: "", -1: " before the last one", 0: " behind the first one"}  # positions that are kept, in words
_FEWEST = 3  # positions, of which one is kept
_STEPS = 50  # of a trial, and a fifth of that for large models
# reversed sequences: .9 of 2.5 as it is and with shuffled positions, .46 with positions; with noisy labels alike
_TIMES = 1.5  # as much loss without positions, and with shuffled ones, as with positions
_GAIN = 0.1  # of the first loss

_REFERENCE = "Vaswani et al., Attention is all you need, 2017, section 3.5; Zaheer et al., Deep sets, 2017"


def lost_order_findings(run: TrainingRun) -> list[Finding]:
    """A finding where the order of tokens does not reach the output."""
    attention, outputs = _attention(run), _outputs(run.done.output)
    for axis in (1, 0):
        tokens = _tokens(run.call, axis)
        if tokens is None or not outputs or any(t.dim() == 0 or len(t) != len(tokens) for t in outputs):
            continue
        if attention is None and not _may_hold_the_same(tokens):
            continue
        how = _moved_by_order(run.call, axis, tokens.shape[1])
        if how == _STAYS:
            return _judged(run, _Samples(tokens, axis), attention)
        if how == _FOLLOWS and axis == 1:
            return _of_every_token(run, tokens, attention)
        for kept in (-1, 0) if tokens.shape[1] >= _FEWEST else ():
            if _moved_by_order(run.call, axis, tokens.shape[1], kept) == _STAYS:
                return _judged(run, _Samples(tokens, axis, kept), attention)
    return []


class _Samples:
    """What samples hold.

    Attributes:
        count: how many there are.
        positions: how many positions each has.
        axis: the axis of the inputs along which positions lie.
        tokens: ``(samples, positions)``, a number for every token that those of the same entries share.
        kept: a position, the first or the last, that is no matter of order; None for none.
        content: for every sample what it holds, whatever the order of what is not kept.
        order: for every sample what it holds, in its order.
    """

    def __init__(self, tokens: Tensor, axis: int, kept: int | None = None) -> None:
        self.count, self.positions, self.axis, self.kept = len(tokens), tokens.shape[1], axis, kept
        self.tokens = _alike(tokens.flatten(0, 1)).reshape(tokens.shape[:2])
        held = self.tokens if kept is None else self.tokens.roll(-1 if kept == 0 else 0, 1)
        mixed = held if kept is None else held[:, :-1]
        sorted_by_number = torch.cat([mixed.sort(1).values, held[:, mixed.shape[1] :]], 1)
        self.content: list[Hashable] = _alike(sorted_by_number).tolist()
        self.order: list[Hashable] = _alike(self.tokens).tolist()


def _alike(rows: Tensor) -> Tensor:
    """A number for every row, which rows of the same entries share."""
    numbers: Tensor = torch.unique(rows, dim=0, return_inverse=True)[1]
    return numbers


def _of_every_token(run: TrainingRun, tokens: Tensor, attention: str | None) -> list[Finding]:
    """Outputs for every token that follow it wherever it is put, where equal tokens of a sample have other targets."""
    if attention is None or any(t.dim() < 2 or t.shape[:2] != tokens.shape[:2] for t in _outputs(run.done.output)):
        return []
    if len(tokens) == tokens.shape[1] and _moved_by_order(run.call, 0, len(tokens)) != _FOLLOWS:
        return []  # as long as it is wide, and what follows are samples
    samples = _Samples(tokens, 1)
    numbers = samples.tokens.tolist()
    content: list[Hashable] = [(samples.content[i], token) for i, row in enumerate(numbers) for token in row]
    order: list[Hashable] = [(place, at) for place in samples.order for at in range(samples.positions)]
    floor = next(iter(_floors(run.done, content, order)), None)
    words = "what is returned for a token is the same, to rounding, wherever in its sample it stands"
    if floor is not None and floor.shared:
        words += (
            f": {floor.shared} of {len(content)} tokens are the same as others of their sample with another target, so "
            f"that the {floor.name} cannot fall below {floor.least:.3g}; {floor.without} {floor.scale:.3g}"
        )
    if floor is None or not floor.least > floor.limit:  # labels that are noise leave as much
        trial = _trial(run, samples, by_heart=True)
        if trial is None or not trial.better:
            return []
        words += trial.words
    return [_finding(run.flow, attention, words, floor)]


def _judged(run: TrainingRun, samples: _Samples, attention: str | None) -> list[Finding]:
    """What follows from being blind to order, for these samples and their targets."""
    assert run.done.loss is not None
    floor = next(iter(_floors(run.done, samples.content, samples.order)), None)
    words = f"the output is the same, to rounding, for the tokens of a sample in any order{_BUT[samples.kept]}"
    sure = floor is not None and floor.least > floor.limit
    if floor is not None and sure:
        words += (
            f": {floor.shared} of {samples.count} samples hold the same tokens as others with another target, so that "
            f"the {floor.name} cannot fall below {floor.least:.3g}; {floor.without} {floor.scale:.3g}"
        )
    elif attention is None:
        return []
    trial = _trial(run, samples)
    if floor is not None and sure and trial is not None and trial.plain < _BELOW * floor.least <= trial.first:
        return []  # what training goes below is no floor: the order is seen by what evaluation leaves out
    better, tried = (False, "") if trial is None else (trial.better, trial.words)
    return [_finding(run.flow, attention or "", words + tried, floor)] if sure or better else []


def _finding(flow: Flow, path: str, evidence: str, floor: _Floor | None) -> Finding:
    return Finding(
        kind="order",
        severity="warning",
        steps=(step_of(flow, path) if path else 0,),
        module_path=path,
        confidence=1.0,
        evidence=evidence,
        remedy="tell positions apart: add a positional embedding or encoding to what goes into "
        f"{path or 'the first layer'}, or read the order by a convolution or a recurrence",
        reference=_REFERENCE,
        numbers={} if floor is None else {"floor": floor.least, "scale": floor.scale},
    )


def _attention(run: TrainingRun) -> str | None:
    """The first module that attends; empty for attention in the code of the model, None without any."""
    modules = dict(run.call.module.named_modules())
    ran = [c.path for c in run.done.calls]
    found = next((path for path in ran if isinstance(modules.get(path), nn.MultiheadAttention)), None)
    if found is not None or run.done.loss is None:
        return found
    inside = any(operation(node).startswith("ScaledDotProduct") for node in nodes_above(run.done.loss))
    return "" if inside else None


def _tokens(call: ForwardPass, axis: int) -> Tensor | None:
    """What is given at every position of every sample, as ``(samples, positions, numbers)``."""
    given = [t for _, t in call.given if t.dim() > 1 and t.layout == torch.strided]
    if not given or given[0].dim() > 3 or (given[0].dim() == 2 and given[0].is_floating_point()):
        return None
    lead = given[0].shape[:2]
    if min(lead) < 2 or max(lead) > _MOST:
        return None
    parts = [t for t in given if t.shape[:2] == lead and t.dim() <= 3]
    if sum(t.numel() for t in parts) > _MOST_NUMBERS:
        return None
    joined = torch.cat([t.detach().double().reshape(*lead, -1) for t in parts], 2)
    if bool(joined.isnan().any()):  # no two of which are equal
        return None
    return joined.transpose(0, 1) if axis == 0 else joined


def _may_hold_the_same(tokens: Tensor) -> bool:
    """Whether samples may hold the same tokens: their sums are the same, as good as never those of measured numbers."""
    sums = tokens.sum(1).round(decimals=4)
    return len(torch.unique(sums, dim=0)) < len(sums)


def _moved_by_order(call: ForwardPass, axis: int, count: int, kept: int | None = None) -> str:
    """Whether the output stays with all positions in another order, or follows them into it; empty for neither.

    So it must at the weights as they are, and with all of them moved: heads and positions may begin at zero. One
    position may be ``kept`` where it is.
    """
    order = _order(count, kept)
    if not _compared(call, axis, count, order):
        return ""
    try:
        with moved_weights(call.module):
            how = _compared(call, axis, count, order)
            one, moved = torch.arange(count), _movable(count, kept)
            one[moved] = moved[0]  # the same at every position: something of them must be read
            return how if how and not _compared(call, axis, count, one, follows=False) else ""
    except StabkitError:
        return ""


def _compared(call: ForwardPass, axis: int, count: int, places: Tensor, *, follows: bool = True) -> str:
    """How the output changes with what stands at every position taken from another one."""
    first = next(t for _, t in call.given if t.dim() > 1)
    lead = first.shape[:2]

    def taken(t: Tensor) -> Tensor:
        return t.index_select(axis, places.to(t.device)) if t.dim() > 1 and t.shape[:2] == lead else t

    plain, other = (_outputs(evaluated(call, change).output) for change in (None, taken))
    if not plain or [t.shape for t in plain] != [t.shape for t in other]:
        return ""
    if _same(plain, other):
        return _STAYS
    if not follows or any(t.dim() <= axis or t.shape[axis] != count for t in plain):
        return ""
    return _FOLLOWS if _same([t.index_select(axis, places.to(t.device)) for t in plain], other) else ""


def _order(count: int, kept: int | None = None) -> Tensor:
    """Positions in another order, which is no shift of them and no reversal: power spectra are blind to those.

    None stays where it is, since it may be all that is read, but for one that is to be ``kept``.

    Example:
        >>> _order(6).tolist(), _order(5).tolist(), _order(6, -1).tolist(), _order(2).tolist()
        ([4, 5, 3, 2, 1, 0], [3, 2, 4, 1, 0], [3, 2, 4, 1, 0, 5], [1, 0])
    """
    if kept is not None:
        order = torch.arange(count)
        moved = _movable(count, kept)
        order[moved] = moved[_order(len(moved))]
        return order
    order = torch.arange(count).flip(0)
    if count == 3:
        return order.roll(1)
    for at in [1] * (count > 3) + [count // 2] * (count % 2):
        order[at - 1 : at + 1] = order[at - 1 : at + 1].flip(0)
    return order


def _movable(count: int, kept: int | None) -> Tensor:
    """All positions but the one that is kept."""
    return torch.arange(1 if kept == 0 else 0, count - 1 if kept == -1 else count)


def _same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(
        float((a - b).abs().max()) <= _ROUNDING * float(a.abs().max()) for a, b in zip(ones, others, strict=True)
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
        name: the name of the loss.
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


@dataclass(frozen=True)
class _Trial:
    """What a short training says.

    Attributes:
        first: the loss before it.
        plain: after it, as it is.
        better: whether it is clearly better with positions.
        words: the same, in words.
    """

    first: float
    plain: float
    better: bool
    words: str


def _trial(run: TrainingRun, samples: _Samples, *, by_heart: bool = False) -> _Trial | None:
    """Training as it is and with positions; None where it was not tried.

    Targets of tokens may be learnt ``by_heart`` where positions tell these apart: only an order counts then.
    """
    assert run.done.loss is not None
    first = float(run.done.loss.detach())
    layout = Layout(samples.count, samples.positions, samples.axis)
    place = layout.embedded(run.call)
    if not place or not first > 0:
        return None
    told = replace(run.call, model=layout.with_positions(run.call, place))
    steps = _STEPS if is_small(run.call.module) else _STEPS // 5
    ends = _after(run.call, run.loss, steps), _after(told, run.loss, steps)
    if any(map(math.isnan, ends)):
        return None
    words = (
        f"; {steps} steps of {ADAM} take the loss from {first:.3g} to {ends[0]:.3g} as it is, to {ends[1]:.3g} with "
        f"sines of the position added behind {place}"
    )
    better = False
    if _clearly(ends[1], ends[0], first):  # what is learnt by heart is no order
        shuffled = replace(run.call, model=layout.with_positions(run.call, place, shuffled=True))
        ran = [_after(each, run.loss, few := min(steps, STEPS)) for each in (run.call, told, shuffled)]
        better = _clearly(ran[1], min(ran[0], ran[2]), first)
        words += (
            f"; {few} steps to {ran[0]:.3g} and {ran[1]:.3g}, and to {ran[2]:.3g} with the same sines in another order "
            "in every sample, which tell tokens apart and no order"
        )
    if not (better or by_heart):  # what is learnt by heart may hold for no other sample
        half = _by_halves(run, layout, place, steps)
        better, words = bool(half), half or words
    return _Trial(first, ends[0], better, words)


def _by_halves(run: TrainingRun, layout: Layout, place: str, steps: int) -> str:
    """What positions do for samples that are held out, in words; empty where that is not clearly more than nothing.

    Nor is it told where the same positions in another order in every sample do as much, as noise may.
    """
    models = (run.call.model, *(layout.with_positions(run.call, place, shuffled=mixed) for mixed in (False, True)))
    plain, told, shuffled = (
        learnt(replace(run.call, model=model), run.loss, steps, samples=layout.count) for model in models
    )
    if plain is None or told is None or shuffled is None or not (told.beats(plain) and told.beats(shuffled)):
        return ""
    shares = [f"{max(each.other, 0.0):.0%}" for each in (plain, told, shuffled)]
    return (
        f"; tried on a copy: up to {steps} steps of {ADAM} on half of the batch take {shares[0]} of the loss of the "
        f"other half away as it is, {shares[1]} with sines of the position added behind {place}, {shares[2]} with "
        "these in another order in every sample"
    )


def _clearly(treated: float, other: float, first: float) -> bool:
    """Whether a loss is clearly below another one."""
    return _TIMES * treated < other and other - treated > _GAIN * first


def _after(call: ForwardPass, loss: Any, steps: int) -> float:
    """The loss after a few steps; NaN where not tried."""
    begun = training_pass(call, loss, differentiate=False).loss
    left = left_after(call, loss, [adam(rate) for rate in RATES], steps=steps)
    return math.nan if begun is None or left is None else left * float(begun.detach())
