"""Factors of a state that nothing keeps below 1: a decay, or a step size, that may take either sign.

exp(-dt A) is a decay while dt and A are positive; a parameter, or a layer, that gives them without an exponential or a
softplus may give the other sign, and the state then grows with time. Each is held to one sign on a copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.computed import Remedy

_UNSTABLE = 1.0  # a factor above it lets the state grow; one below -1 is of a step that is too long
_FAR = 1e30  # no bound
_HALF = 0.5  # of what a fresh linear layer gives is negative
_STEP = re.compile(r"dt|delta|step|tau")  # a step size, which is never meant to be negative


def held_below_one(model: nn.Module, path: str, makers: Sequence[str], factors: tuple[float, float]) -> list[Remedy]:
    """What may keep the factor of a recurrence from growing its state, each for one parameter or one layer.

    Args:
        model: the whole model.
        path: the module in which the recurrence runs.
        makers: parameters that its factor is made of.
        factors: the least and the largest real part of the entries of the factor.

    Example:
        >>> held_below_one(nn.Linear(1, 1), "", ["weight"], (0.5, 0.9))
        []
    """
    low, high = factors
    if not high > _UNSTABLE or low < -_UNSTABLE:
        return []
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    begin = f"the factor of the state reaches {high:.3g}, since nothing bounds "
    found: list[tuple[float, Remedy]] = []  # with the share of entries that it changes: most are as they were meant
    layers = dict.fromkeys(name.rpartition(".")[0] for name in makers)
    linear = [each for each in layers if each != path and isinstance(modules.get(each), nn.Linear)]
    for name in [name for name in makers if name.rpartition(".")[0] not in linear]:
        values = named[name].detach()
        below, above = (float(part.double().mean()) for part in (values < 0, values > 0))
        if (float(values.min()), float(values.max())) == (low, high):
            text = f"keep {name} below 1 in size: exp(-softplus({name})), or a sigmoid, in its place"
            found.append((0.0, Remedy(text, (remedies.clip(name, -1.0, 1.0),), cause=begin + name)))
            continue
        if below:
            text = f"keep {name} positive: softplus({name}), or exp of its logarithm, in its place"
            found.append((below, Remedy(text, (remedies.clip(name, 0.0, _FAR),), cause=begin + name)))
        if above and not _STEP.search(name.rpartition(".")[2].lower()):
            text = f"keep {name} negative: -exp({name}_log) in its place, with {name}_log its logarithm"
            found.append((above, Remedy(text, (remedies.clip(name, -_FAR, 0.0),), cause=begin + name)))
    for each in linear:
        text = f"put a softplus behind {each}: what it gives is to be positive"
        found.append((_HALF, Remedy(text, (remedies.activate_after(each, "Softplus"),), cause=f"{begin}{each}")))
    return [remedy for _, remedy in sorted(found, key=lambda pair: pair[0])]
