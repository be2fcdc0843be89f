"""Recurrences over time that are written out inside a module: the gradient that reaches each of their states.

Scans of state-space layers and cells of bare parameters call no module in their loops. They are found in the graph that
was recorded, and one backward pass of that shows how much of the gradient of the loss arrives at every state: that of
later outputs included, as for the cells of torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stabkit.diagnosis.over_time.profile import FEWEST, TimeProfile, logs_of
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.identification.record import Recurrence
from stabkit.identification.time.over_time import Recurrences
from stabkit.tracing import Flow
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.graph.scans import Scan
from stabkit.tracing.graph.values import meta_of
from stabkit.tracing.maps.scan_flow import growth_over, scans_of
from stabkit.tracing.recording.training_pass import combination

_LEFT = 2.0  # nats that the whole sequence may change gradients by after a remedy: well within any range
_FEW = 3  # parameters that are tried
_UNSTABLE = 1.0  # a factor above it lets the state grow; one below -1 is of a step that is too long
_FAR = 1e30  # no bound
_HALF = 0.5  # of what a fresh linear layer gives is negative
_STEP = re.compile(r"dt|delta|step|tau")  # a step size, which is never meant to be negative


class WrittenOut:
    """The recurrences of a flow that no module is called for.

    Args:
        flow: a traced forward pass.
        known: modules that are judged by what they return each time.
    """

    def __init__(self, flow: Flow, known: Collection[str] = ()) -> None:
        self._flow, self._known = flow, frozenset(known)
        self._scans = [scan for scan in scans_of(flow, 0, len(flow.steps), FEWEST) if not self._is_called(scan)]
        self._paths = [flow.recorded.path_of(scan.cycle[-1]) for scan in self._scans]
        self._readings = Recurrences(flow)
        self._records: tuple[Recurrence, ...] | None = None

    def _is_called(self, scan: Scan) -> bool:
        """Whether most of the time steps of a recurrence call a module that is judged by itself."""
        graph = self._flow.recorded.graph
        low, high = scan.positions[0], scan.positions[-1]
        calls = self._flow.recorded.recording.calls if self._known else ()
        return 2 * sum(low <= graph.position(c.start) <= high for c in calls if c.path in self._known) >= len(scan)

    def profiles(self, loss: Any) -> list[TimeProfile]:
        """The gradient over time of each; ``loss`` as for a diagnosis."""
        flow = self._flow
        if not self._scans:
            return []
        total = combination(flow.output, flow.forward_pass.seed) if loss is None else scalar_loss(loss, flow.output)
        if total is None:
            return []
        modules = dict(flow.model.named_modules())
        edges = [value.edge for scan in self._scans for state in scan.states for value in state]
        gradients = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)  # one pass back for all
        squares = iter([0.0 if g is None else float(torch.linalg.vector_norm(g.detach())) ** 2 for g in gradients])
        found: list[TimeProfile] = []
        for scan, path in zip(self._scans, self._paths, strict=True):
            sizes = torch.tensor([math.sqrt(sum(next(squares) for _ in state)) for state in scan.states])
            width = (*meta_of(scan.states[0][0]).shape, 1)[-2]
            place = sum(profile.path == path for profile in found)
            module = modules.get(path, flow.model)
            step = sum(state.position <= scan.positions[0] for state in flow.states[1:])
            unit = "chunks" if scan.width > 1 else "time steps"
            found.append(
                TimeProfile(path, module, logs_of(sizes), loop=True, width=width, place=place, step=step, unit=unit)
            )
        return found

    def measured(self, profile: TimeProfile, loss: Any) -> tuple[float, float]:
        """The growth of the recurrence that a profile is of, and what its own steps do to a gradient, nats."""
        same = (profile.path, profile.place)
        found = next((p.growth for p in self.profiles(loss) if (p.path, p.place) == same), math.nan)
        indices = [i for i, path in enumerate(self._paths) if path == profile.path]
        if profile.place >= len(indices):
            return found, math.nan
        return found, sum(growth_over(self._flow, self._scans[indices[profile.place]]))

    def again(self) -> WrittenOut:
        """Those of the same call at the weights that the model has now."""
        return WrittenOut(self._flow.again(), self._known)

    def with_method(self, profile: TimeProfile) -> TimeProfile:
        """A profile with the method of its steps, and what they alone do to a gradient."""
        if self._records is None:
            self._records = self._readings.of(self._scans)
        index = self._index(profile)
        record = self._records[index]
        own = math.nan if record.growth is None else record.growth * len(self._scans[index])
        return replace(profile, method=record.name, fed=record.fed or record.name.startswith("gated"), own=own)

    def constraints(self, profile: TimeProfile) -> list[Remedy]:
        """What may keep the factor of a linear recurrence, whose state grows, from being larger than 1."""
        place = self._index(profile)
        makers = self._readings.makers(self._scans, place)
        factors = self._readings.range_of_factor(self._scans, place)
        return held_below_one(self._flow.model, profile.path, makers, factors)

    def remedies(self, profile: TimeProfile, growth: float) -> list[Remedy]:
        """Parameters that set the factor of a linear recurrence, moved until it is nearer to one.

        Most factors are exponentials of exponentials, or sigmoids: moving what they are made of by the log of a ratio
        changes log|a| by about that ratio.
        """
        steps = len(profile.log_gradient)
        growth = growth if math.isfinite(growth) else math.copysign(20.0 * steps, growth)
        ratio = math.log(abs(growth) / _LEFT)
        found = []
        for path, slope in self._readings.levers(self._scans, self._index(profile))[:_FEW]:
            # growth of gradients back over time is that of the factor
            for amount in (ratio, ratio + 2.0):
                by = -math.copysign(amount, growth) * math.copysign(1.0, slope)
                text = (
                    f"move every entry of {path} by {by:+.3g}, which brings the factors of the state nearer to 1 over "
                    f"{steps} time steps"
                )
                found.append(Remedy(text, (remedies.shift(path, by),)))
        return found

    def _index(self, profile: TimeProfile) -> int:
        return [i for i, path in enumerate(self._paths) if path == profile.path][profile.place]


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
