"""Initialisations that are meant to let little or nothing pass at first: LayerScale, branches and heads of zeros.

Training moves them first, so they are no fault as long as they stand as they were made: every entry the same, in every
block alike. A single block of zeros among others that are not is a fault.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from stabkit.diagnosis.blocks.weights import Weight
from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies import computed as remedies

_SMALL = 0.5  # constant scales below this are LayerScale; those of norms are 1
_EQUAL = 1e-6  # relative deviation of entries that are all the same, in single precision


@dataclass(frozen=True)
class Known:
    """Initialisations of a model that are known by name.

    Attributes:
        words: what they are and where.
        actions: what puts weights of ordinary size in their place, to see what the model does without them.
    """

    words: str
    actions: tuple[Action, ...]


def known_initialisations(measurement: Measurement) -> Known | None:
    """Weights that stand at a known initialisation; None where there are none."""
    held = {w.path: w for s in measurement.steps for w in s.weights if w.kind != "bias" and w.finite}
    ends = {w.path for s in measurement.steps[-1:] for w in s.weights}
    roles: defaultdict[str, list[Weight]] = defaultdict(list)
    for weight in held.values():
        roles[weight.role].append(weight)
    zeros: list[Weight] = []
    scales: list[Weight] = []
    for members in roles.values():
        alike = len(members) > 1 or members[0].path in ends
        if alike and all(w.gains[0] == -math.inf for w in members):
            zeros += members
        elif all(_is_small_constant(w) for w in members) and members[0].path.rpartition(".")[2] != "weight":
            scales += members
    zeros += [weight for weight in _zero_scales(measurement) if weight not in zeros]
    if not zeros and not scales:
        return None
    words = []
    if scales:
        words.append(f"LayerScale of {abs(scales[0].mean):.3g} ({_places(scales)})")
    if zeros:
        words.append(f"weights that start at zero ({_places(zeros)})")
    actions = [remedies.fill(w.path, 1.0) for w in scales + [w for w in zeros if w.kind == "scale"]]
    actions += [remedies.redraw(w.path, 1.0 / w.unit) for w in zeros if w.kind == "matrix"]
    return Known(" and ".join(words), tuple(actions))


def _zero_scales(measurement: Measurement) -> list[Weight]:
    """Scales of norms that are zero in most blocks, whatever the norms are called: the last norm of every branch."""
    scaled = [[w for w in s.weights if w.kind == "scale" and w.finite] for s in measurement.steps]
    zeros = [[w for w in found if w.gains[0] == -math.inf] for found in scaled]
    count = sum(map(bool, zeros))
    return [w for found in zeros for w in found] if count > 1 and 2 * count > sum(map(bool, scaled)) else []


def _is_small_constant(weight: Weight) -> bool:
    rms = math.exp(weight.gains[0]) / weight.unit
    return 0 < rms < _SMALL and abs(rms - abs(weight.mean)) <= _EQUAL * rms


def _places(weights: list[Weight]) -> str:
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    return f"{weights[0].path}{more}"
