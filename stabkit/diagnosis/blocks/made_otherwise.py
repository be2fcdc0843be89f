"""A last block that was made with another constant than its peers, as its code says: a fact, and no fault by itself."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from stabkit.diagnosis.finding import Finding, serious

_FEWEST = 5  # peers that agree on a constant, from which another one is told by them
_LITTLE = math.log(2.0)  # deviation of the gain of a block up to which no harm of it is measured, nats
_OF_TORCH = frozenset(vars(nn.Module()))
_KINDS = ("exploding", "vanishing", "unstable_step", "overdamped")


def made_otherwise(model: nn.Module, suspect: Finding) -> Finding | None:
    """A suspect that is the first or last of its class, differs by constants, and passes gradients like its peers.

    The last residual block of a stage often adds its branch in full, or leaves out its activation, where those before
    it do not. None where weights are odd, or the gain is that of a fault.

    Args:
        model: the model that was diagnosed.
        suspect: a suspect of it.
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
    return replace(
        suspect,
        severity="info",
        evidence=f"{suspect.evidence}; it is the {end} {type(block).__name__} and was "
        f"made with {told}, and passes gradients on at less than twice the size that its peers do",
        remedy="none is needed where that is on purpose: no harm of it was measured",
        actions=(),
    )


def _constants(module: nn.Module) -> dict[str, float | bool | str | None]:
    """The plain values that a module was made with."""
    kept = {name: value for name, value in vars(module).items() if name not in _OF_TORCH and not name.startswith("_")}
    return {name: value for name, value in kept.items() if value is None or isinstance(value, bool | int | float | str)}
