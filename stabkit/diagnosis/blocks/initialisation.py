"""Initialisations that are meant to let little or nothing pass at first: LayerScale, branches and heads of zeros.

Training moves them first, so they are no fault as long as they stand as they were made: every entry the same, in every
block alike. A single block of zeros among others that are not is a fault.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from stabkit.diagnosis.blocks.weights import Weight
from stabkit.diagnosis.finding import Action, Finding, as_fact, serious
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies import computed as remedies

_SMALL = 0.5  # constant scales below this are LayerScale; those of norms are 1
_EQUAL = 1e-6  # relative deviation of entries that are all the same, in single precision
_FEWEST = 5  # peers that agree on a constant, from which another one is told by them
_LITTLE = math.log(2.0)  # deviation of the gain of a block up to which no harm of it is measured, nats
_OF_TORCH = frozenset(vars(nn.Module()))
_KINDS = ("exploding", "vanishing", "unstable_step", "overdamped")


@dataclass(frozen=True)
class Known:
    """Initialisations of a model that are known by name.

    Attributes:
        words: what they are and where.
        actions: what puts weights of ordinary size in their place, to see what the model does without them.
    """

    words: str
    actions: tuple[Action, ...]


def known_initialisations(measurement: Measurement, frozen: Collection[str] = ()) -> Known | None:
    """Weights that stand at a known initialisation; None where there are none.

    Args:
        measurement: of the model as it is.
        frozen: paths of parameters that are not trained: an adapter beside them begins at zero (LoRA).
    """
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
    zeros += [weight for weight in (*_zero_scales(measurement), *_adapters(measurement, frozen)) if weight not in zeros]
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


def _adapters(measurement: Measurement, frozen: Collection[str]) -> list[Weight]:
    """Matrices of zeros that are trained, in steps that a frozen matrix takes part in which is none of zeros."""
    found = []
    for step in measurement.steps:
        matrices = [w for w in step.weights if w.kind == "matrix" and w.finite]
        if any(w.path in frozen and w.gains[0] > -math.inf for w in matrices):
            found += [w for w in matrices if w.path not in frozen and w.gains[0] == -math.inf]
    return found


def _is_small_constant(weight: Weight) -> bool:
    rms = math.exp(weight.gains[0]) / weight.unit
    return 0 < rms < _SMALL and abs(rms - abs(weight.mean)) <= _EQUAL * rms


def _places(weights: list[Weight]) -> str:
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    return f"{weights[0].path}{more}"


def made_otherwise(model: nn.Module, suspect: Finding) -> Finding | None:
    """A suspect that is the first or last of its class, differs by constants, and passes gradients like its peers.

    The last residual block of a stage often adds its branch in full, or leaves out its activation, where those before
    it do not. None where weights are odd, or the gain is that of a fault.
    """
    if not serious(suspect) or suspect.kind not in _KINDS or any("weight_deviation" in n for n in suspect.numbers):
        return None
    if not abs(suspect.numbers.get("gain_deviation", math.inf)) < _LITTLE:
        return None
    blocks = {path: m for path, m in model.named_modules() if path}
    if suspect.module_path not in blocks:
        return None
    block = blocks[suspect.module_path]
    alike = [m for m in blocks.values() if type(m) is type(block)]
    if len(alike) <= _FEWEST or not (block is alike[0] or block is alike[-1]):
        return None
    peers = [_constants(m) for m in alike if m is not block]
    odd = {
        name: (value, peers[0][name])
        for name, value in _constants(block).items()
        if all(name in peer and peer[name] == peers[0][name] != value for peer in peers)
    }
    if not odd:
        return None
    end = "last" if block is alike[-1] else "first"
    told = " and ".join(f"{name} = {own!r} and not {theirs!r}" for name, (own, theirs) in odd.items())
    words = (
        f"it is the {end} {type(block).__name__} and was made with {told}, and passes gradients on at less than twice "
        "the size that its peers do"
    )
    return as_fact(suspect, words, "none is needed where that is on purpose: no harm of it was measured")


def _constants(module: nn.Module) -> dict[str, float | bool | str | None]:
    """The plain values that a module was made with."""
    kept = {name: value for name, value in vars(module).items() if name not in _OF_TORCH and not name.startswith("_")}
    return {name: value for name, value in kept.items() if value is None or isinstance(value, bool | int | float | str)}
