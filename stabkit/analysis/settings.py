"""What an analysis measures, and what of it a budget leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from stabkit.diagnosis import Thresholds
from stabkit.distributed import Ranks, is_tensor_parallel, whole_parameters
from stabkit.errors import StabkitError
from stabkit.planning import Plan, plan
from stabkit.tracing.recording.batch_parts import Call


@dataclass(frozen=True)
class Settings:
    """What is measured of a model, and how much of it.

    Attributes:
        loss: on the model's output.
        where: where to trace: ``depth``, ``source``, ``target`` and ``seed``.
        spectrum: how spectra are computed.
        spectrum_samples: of how many samples.
        probes: random cotangents per sample when there is no loss.
        thresholds: the limits behind the verdict.
        seed: the seed of every random choice.
        spectrum_share: part of the work of a default report that spectra may take.
        given_up: what was left out to keep a budget, in sentences.
        optimizer: whose updates are measured beside.
        scheduler: of its rates.
        trained: whether the weights are known to have been trained.
    """

    loss: Callable[[Any], torch.Tensor] | None
    where: Mapping[str, Any]
    spectrum: str
    spectrum_samples: int
    probes: int
    thresholds: Thresholds
    seed: int
    spectrum_share: float = 1.0
    given_up: tuple[str, ...] = ()
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None
    trained: bool = False


def planned(
    group: Ranks, model: Any, call: Call, settings: Settings, budget: str | float | None, memory: str | float | None
) -> Plan:
    """What the analysis will cost in one process; the first rank measures it for all."""

    def foretell() -> Plan | None:
        if not (group.first or is_tensor_parallel(model)):
            return None
        return plan(
            model,
            *call.inputs,
            loss=settings.loss,
            kwargs=call.kwargs,
            batch_dim=call.batch_dim,
            spectrum=settings.spectrum,
            spectrum_samples=settings.spectrum_samples,
            probes=settings.probes,
            budget=budget,
            memory=memory,
            **settings.where,
        )

    with whole_parameters(model):
        found = group.together(foretell)
    agreed: Plan = group.gather(found)[0]
    return agreed


def affordable(
    foretold: Plan, call: Call, settings: Settings, budget: str | float | None, memory: str | float | None
) -> tuple[Call, Settings]:
    """As many samples, and as much of the rest, as the plan allows."""
    if not foretold.fits:
        limits = [f"{name}={given}" for name, given in (("budget", budget), ("memory", memory)) if given is not None]
        raise StabkitError(
            f"no analysis of this model keeps {' and '.join(limits)}; the least that one takes:\n{foretold}"
        )
    chosen = foretold.settings
    return call.part(0, chosen.samples), replace(
        settings,
        probes=chosen.probes,
        spectrum=chosen.spectrum,
        spectrum_samples=chosen.spectrum_samples,
        spectrum_share=chosen.spectrum_share,
        given_up=tuple(f"left out to keep the budget: {words}" for words in foretold.given_up),
    )
