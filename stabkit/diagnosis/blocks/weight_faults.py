"""Parameters whose size is far from that of the same parameter in the other blocks."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from stabkit.diagnosis.blocks.peers import Deviation, Peers, deviation, nearest_to_peers
from stabkit.diagnosis.blocks.weights import Weight
from stabkit.diagnosis.measurement import StepMeasurement
from stabkit.diagnosis.thresholds import Thresholds

FEWEST_PEERS = 2  # with one peer alone, neither can be told to be the odd one
_FEW = 5  # peers under which only what is far beyond all of them counts
_FAR = math.log(10.0)  # that far, nats
# how far a matrix without peers may lie above or below the range of all others, at least, nats: heads are often small
_ABOVE, _BELOW = math.log(4.0), math.log(10.0)
_SIGMAS = 3.0  # standard deviations that such a distance counts as


@dataclass(frozen=True)
class WeightFault:
    """A parameter far from its peers.

    Attributes:
        step: index of the step that uses it.
        weight: the parameter.
        deviation: how far it is.
        alone: whether it has no peers of its role, and was held against all matrices.
    """

    step: int
    weight: Weight
    deviation: Deviation
    alone: bool = False


def weight_faults(steps: Sequence[StepMeasurement], thresholds: Thresholds) -> list[WeightFault]:
    """Matrices and scales far from those of the same role, or, without such, outside the range of all matrices."""
    owners: dict[str, tuple[int, Weight]] = {}
    for step in steps:
        for weight in step.weights:
            if weight.kind != "bias" and weight.finite and not weight.tied:
                owners.setdefault(weight.path, (step.index, weight))
    found, judged = [], set()
    for group in _groups([weight for _, weight in owners.values()]):
        sizes = [Peers(column) for column in zip(*(weight.gains for weight in group), strict=True)]
        zeros = sum(weight.gains[0] == -math.inf for weight in group)
        for index, weight in enumerate(group):
            if weight.path in judged:
                continue
            judged.add(weight.path)
            if weight.gains[0] == -math.inf and zeros > 1:
                continue  # several that start at zero are meant to
            readings = [peers.deviation(index) for peers in sizes]
            # two peers agree by chance in one of the conventions
            far = nearest_to_peers(readings) if len(group) > FEWEST_PEERS + 1 else min(readings, key=_distance)
            least = thresholds.outlier_weight if far.peers >= _FEW else _FAR
            if far.exceeds(least, thresholds.outlier) and _by_entries(group, index, far):
                found.append(WeightFault(owners[weight.path][0], weight, far))
    # of tables of positions and the like, and of what is held fixed without peers (a stencil), no size is expected
    matrices = {p: (i, w) for p, (i, w) in owners.items() if w.kind == "matrix" and p.endswith("weight")}
    for path, (step_index, weight) in matrices.items():
        if path in judged or weight.fixed:
            continue
        far_off = _outside(weight, [other for _, other in matrices.values() if other is not weight])
        if far_off is not None:
            found.append(WeightFault(step_index, weight, far_off, alone=True))
    return sorted(found, key=lambda fault: -abs(fault.deviation.size))


def _groups(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Weights of one role, first by their whole names; roles with too few members by names without any number.

    Such names join layers of several kinds, so that one peer more is asked for.
    """
    groups: list[list[Weight]] = []
    rest = list(weights)
    for key, fewest in ((lambda w: w.role, FEWEST_PEERS), (lambda w: re.sub(r"\d+", "*", w.role), FEWEST_PEERS + 1)):
        by_role: defaultdict[tuple[str, str], list[Weight]] = defaultdict(list)
        for weight in rest:
            by_role[key(weight), weight.kind].append(weight)
        groups += [members for members in by_role.values() if len(members) > fewest]
        rest = [w for members in by_role.values() if len(members) <= fewest for w in members]
    return groups


def _by_entries(group: Sequence[Weight], index: int, far: Deviation) -> bool:
    """Whether the entries themselves are as far from those of the peers, half of it at least, where shapes differ."""
    if far.size == -math.inf or len({weight.unit for weight in group}) == 1:
        return True
    entries = deviation([_log_rms(weight) for weight in group], index)
    return entries.size * far.size > 0 and abs(entries.size) > 0.5 * abs(far.size)


def _log_rms(weight: Weight) -> float:
    return weight.gains[0] - math.log(weight.unit)


def _distance(found: Deviation) -> float:
    return math.inf if math.isnan(found.size) else abs(found.size)


def _outside(weight: Weight, others: Sequence[Weight]) -> Deviation | None:
    """How far a matrix lies outside the range of all others, by its entries and by its fan-in alike.

    Its shape is its own, so each of the two alone would hold the shape against it.
    """
    if len(others) <= FEWEST_PEERS or not all(math.isfinite(w.gains[0]) for w in others):
        return None
    above = _ABOVE if len(others) >= _FEW else _FAR
    entries = _beyond(_log_rms(weight), [_log_rms(other) for other in others], above, _BELOW)
    gain = _beyond(weight.gains[0], [other.gains[0] for other in others], above, _BELOW)
    return gain if entries is not None and gain is not None and entries.size * gain.size > 0 else None


def _beyond(value: float, others: Sequence[float], least_above: float, least_below: float) -> Deviation | None:
    """The deviation from the nearer end of the range of all others, when it is larger than that range; else None."""
    low, high = min(others), max(others)
    above = value > high
    limit = max(least_above if above else least_below, high - low)
    far = Deviation(value, high if above else low, limit / _SIGMAS, len(others))
    return far if (far.size if above else -far.size) > limit else None


def bias_faults(steps: Sequence[StepMeasurement], thresholds: Thresholds) -> dict[int, list[Weight]]:
    """By step, biases far larger than those of the peers.

    A bias is added to something of about size 1, so log(1 + rms) is what is compared.
    """
    owners = {w.path: (s.index, w) for s in reversed(steps) for w in s.weights if w.kind == "bias" and w.finite}
    found: dict[int, list[Weight]] = {}
    for group in _groups([weight for _, weight in owners.values()]):
        sizes = Peers([math.log1p(math.exp(min(weight.gains[0], 50.0))) for weight in group])
        for index, weight in enumerate(group):
            far = sizes.deviation(index)
            if far.size > 0 and far.exceeds(thresholds.outlier_weight, thresholds.outlier):
                found.setdefault(owners[weight.path][0], []).append(weight)
    return found


def rank_faults(steps: Sequence[StepMeasurement], thresholds: Thresholds) -> list[WeightFault]:
    """Matrices of far lower effective rank than those of the same role: most of what they are given is lost."""
    owners = {w.path: (s.index, w) for s in reversed(steps) for w in s.weights if math.isfinite(w.log_rank)}
    found, judged = [], set()
    for group in _groups([weight for _, weight in owners.values()]):
        ranks = Peers([weight.log_rank for weight in group])
        for index, weight in enumerate(group):
            judged.add(weight.path)
            far = ranks.deviation(index)
            if far.size < 0 and far.peers >= _FEW and far.exceeds(thresholds.outlier_behaviour, thresholds.outlier):
                found.append(WeightFault(owners[weight.path][0], weight, far))
    for path, (step, weight) in owners.items():
        if path in judged or not path.endswith("weight"):
            continue
        others = [other.log_rank for _, other in owners.values() if other is not weight]
        if len(others) >= _FEW:
            outside = _beyond(weight.log_rank, others, math.inf, thresholds.outlier_behaviour)
            if outside is not None:
                found.append(WeightFault(step, weight, outside, alone=True))
    return sorted(found, key=lambda fault: fault.deviation.size)
