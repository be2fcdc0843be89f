"""Parameters whose size is far from that of the same parameter in the other blocks."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from stabkit.diagnosis.measurement import StepMeasurement
from stabkit.diagnosis.peers import Deviation, deviation, nearest_to_peers
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.weights import Weight

FEWEST_PEERS = 2  # with one peer alone, neither can be told to be the odd one
# how far a matrix without peers may lie above or below the range of all others, at least, nats: heads are often small
_ABOVE, _BELOW = math.log(4.9), math.log(10.0)
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
            if weight.kind != "bias" and weight.finite:
                owners.setdefault(weight.path, (step.index, weight))
    found, judged = [], set()
    for group in _groups([weight for _, weight in owners.values()]):
        for index, weight in enumerate(group):
            if weight.path in judged:
                continue
            judged.add(weight.path)
            if weight.gains[0] == -math.inf and sum(w.gains[0] == -math.inf for w in group) > 1:
                continue  # several that start at zero are meant to
            far = nearest_to_peers([_at(group, index, c) for c in range(len(weight.gains))])
            if far.exceeds(thresholds.outlier_weight, thresholds.outlier):
                found.append(WeightFault(owners[weight.path][0], weight, far))
    alone = [weight for _, weight in owners.values() if weight.kind == "matrix" and weight.path not in judged]
    for weight in alone:
        others = [other for _, other in owners.values() if other is not weight and other.kind == "matrix"]
        far_off = _outside(weight, others)
        if far_off is not None:
            found.append(WeightFault(owners[weight.path][0], weight, far_off, alone=True))
    return sorted(found, key=lambda fault: -abs(fault.deviation.size))


def _groups(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Weights of one role, first by their whole names; roles with too few members by names without any number."""
    groups: list[list[Weight]] = []
    rest = list(weights)
    for key in (lambda w: w.role, lambda w: re.sub(r"\d+", "*", w.role)):
        by_role: defaultdict[tuple[str, str], list[Weight]] = defaultdict(list)
        for weight in rest:
            by_role[key(weight), weight.kind].append(weight)
        groups += [members for members in by_role.values() if len(members) > FEWEST_PEERS]
        rest = [w for members in by_role.values() if len(members) <= FEWEST_PEERS for w in members]
    return groups


def _at(group: Sequence[Weight], index: int, convention: int) -> Deviation:
    return deviation([weight.gains[convention] for weight in group], index)


def _outside(weight: Weight, others: Sequence[Weight]) -> Deviation | None:
    """How far a matrix lies outside everything that its size and those of the others can mean; None if within."""
    ends = [(min(w.gains), max(w.gains)) for w in others if math.isfinite(w.gains[0])]
    if len(ends) <= FEWEST_PEERS or not math.isfinite(weight.gains[0]):
        return None
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    nearest, edge = (min(weight.gains), high) if min(weight.gains) > high else (max(weight.gains), low)
    off = nearest - edge
    limit = max(_ABOVE if edge == high else _BELOW, high - low)
    outside = off > limit if edge == high else -off > limit
    return Deviation(nearest, edge, limit / _SIGMAS, len(ends)) if outside else None
