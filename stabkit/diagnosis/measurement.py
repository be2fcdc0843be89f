"""Everything that a diagnosis rests on, measured in one walk back through the flow."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabkit.diagnosis.blocks.small_start import owed
from stabkit.diagnosis.blocks.weights import Weight, Weights, ends_in_norm, norms_in
from stabkit.diagnosis.depth.branches import Merge, merges
from stabkit.diagnosis.states.activity import Activity, activities
from stabkit.parallel import SERIAL, Parallel, runs
from stabkit.tracing import Flow, FlowLike, Iteration, Step, StepLike
from stabkit.tracing.graph.values import entries_are_finite
from stabkit.walk import (
    Arrivals,
    Observer,
    Passage,
    Pulled,
    Walk,
    drawn,
    joined,
    loss_columns,
    norms,
    probe_seeds,
    random_columns,
    space_at,
    walk_back,
)

Array = npt.NDArray[np.float64]

_GAIN_PROBES = 2  # fresh random cotangents of every step, which know nothing of those that arrive
_GAIN = 7919  # between their seeds


@dataclass(frozen=True)
class StepMeasurement:
    """What one step did to states and cotangents.

    Attributes:
        index: the index of the step.
        name: the name of the step.
        module_path: the module path of the step.
        module_class: the class of that module.
        kind: ``"step"`` or ``"transition"``.
        space: shapes of its source and target.
        gain: ``(samples,)``, 1/2 log(|J|_F^2 / m) estimated from fresh random cotangents, nats.
        log_change: log of the rms of the state after over that before, mean over samples, nats.
        log_branch: log of the rms of what the step adds to its state, mean over samples; NaN where it has no merges.
        unchanged: share of coordinates that a step with merges leaves bit for bit what they were.
        merges: additions of a branch to a skip.
        activities: its elementwise activations.
        weights: its parameters.
        norms: how many norms run in it.
        renormalised: whether it ends in a norm, so that the size of its result is not its own.
        finite: whether the state after it is finite where that before it is.
        owed: what its gain owes to a source smaller than 1 that it reads through a norm, nats.
    """

    index: int
    name: str
    module_path: str
    module_class: str
    kind: str
    space: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    gain: Array
    log_change: float
    log_branch: float = math.nan
    unchanged: float = 0.0
    merges: tuple[Merge, ...] = ()
    activities: tuple[Activity, ...] = ()
    weights: tuple[Weight, ...] = ()
    norms: int = 0
    renormalised: bool = False
    finite: bool = True
    owed: float = 0.0

    @cached_property
    def mean_gain(self) -> float:
        """The gain, mean over samples; -inf where nothing passes."""
        return float(self.gain.mean()) if self.gain.size else math.nan

    def home(self, weights: Sequence[Weight] = ()) -> str:
        """Where to look: the module of the step, or that of the first weight where the step spans several modules."""
        if not weights or not self.module_path or weights[0].path.startswith(f"{self.module_path}."):
            return self.module_path
        return weights[0].module_path


@dataclass(frozen=True)
class Measurement:
    """A flow as a diagnosis sees it.

    Attributes:
        steps: one record per step.
        growth: ``(steps, columns)``, log of the gradient norm before a step over that after it, nats; a column is a
            sample, or a sample and a probe. -inf where a step passes nothing back; a new cotangent is drawn before it.
        log_gradients: ``(states, columns)``, log of the gradient norm, in the units of the loss; -inf for a sample
            that nothing comes back to.
        log_states: ``(states, samples)``, log of the rms of the states.
        restarts: states at which random cotangents were drawn anew for all samples, since nothing came back to them.
        loss: what was differentiated, in words.
        probes: how many cotangents were pulled back per sample.
        pulled: the same walk as `stabkit.attribute` takes it, for the first samples; None where none was kept.
    """

    steps: tuple[StepMeasurement, ...]
    growth: Array
    log_gradients: Array
    log_states: Array
    restarts: tuple[int, ...]
    loss: str
    probes: int
    pulled: Pulled | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every step."""
        return tuple(step.kind for step in self.steps)


def measure(
    flow: FlowLike,
    loss: object = None,
    *,
    probes: int = 4,
    seed: int = 0,
    kept: int = 4,
    parallel: Parallel = SERIAL,
) -> Measurement:
    """Growth, gains, branches, activity and weights of every step.

    Args:
        flow: a traced forward pass, or an iterated map.
        loss: a callable on the model's output that returns a scalar. None pulls back ``probes`` random cotangents.
        probes: random cotangents per sample when there is no loss; with one, it alone is pulled back.
        seed: the seed of the cotangents.
        kept: samples, from the first, whose cotangents are kept at small steps for `Measurement.pulled`.
        parallel: who pulls back which cotangents, and measures which steps.
    """
    seeds = [seed] if loss is not None else probe_seeds(seed, probes)
    states = _States.of(flow)
    walk, arrivals, measured = _shared_walks(flow, loss, seeds, states, seed, kept, parallel)
    words = f"{probes} standard normal cotangents per sample"
    words = words if loss is None else getattr(loss, "__name__", type(loss).__name__)
    return Measurement(
        steps=tuple(measured),
        growth=_columns(walk.growth),
        log_gradients=_columns(walk.log_norms),
        log_states=states.log_rms,
        restarts=walk.restarts,
        loss=words,
        probes=len(seeds),
        pulled=Pulled.of(walk, arrivals, kept, words),
    )


def _columns(values: Tensor) -> Array:
    """``(steps, batch, k)`` as ``(steps, k * batch)``: all samples of the first cotangent come first."""
    flat: Array = values.transpose(1, 2).flatten(1).numpy()
    return flat


@dataclass(frozen=True)
class _States:
    """Sizes of the states: log of the root mean square ``(states, samples)``, and whether all entries are finite."""

    log_rms: Array
    finite: tuple[bool, ...]

    @classmethod
    def of(cls, flow: FlowLike) -> _States:
        """Those of a flow; an iterated map is run once, and stops where a state is not finite."""
        states = flow.trajectory() if isinstance(flow, Iteration) else (state.flatten() for state in flow.states)
        rows, finite = [], []
        for state in states:
            flat = state.detach()
            rows.append((norms(flat.unsqueeze(2))[:, 0] / math.sqrt(flat.shape[1])).log())
            finite.append(entries_are_finite(flat))
        return cls(torch.stack(rows).numpy(), tuple(finite))


_Part = tuple[Walk, tuple[Tensor | None, ...], list[StepMeasurement]]


def _shared_walks(
    flow: FlowLike, loss: object, seeds: Sequence[int], states: _States, seed: int, kept: int, parallel: Parallel
) -> _Part:
    """Everyone walks back with some of the cotangents and measures some of the steps on the way."""
    count = len(flow)
    mine = runs(len(seeds), parallel.count)

    def walk(given: Sequence[int], wanted: Container[int]) -> _Part:
        columns = loss_columns(flow, [loss]) if given and loss is not None else random_columns(flow, given)
        arrivals, steps = Arrivals(count, kept), _Steps(flow, states, wanted, seed)
        found = walk_back(flow, columns, given, renewal="each", observers=[arrivals, steps])
        return found, arrivals.columns, steps.measured[::-1]

    def part(number: int) -> _Part:
        low, high = mine[number]
        return walk(seeds[low:high], range(number, count, parallel.count))

    found = parallel.share(part, [1.0] * parallel.count, name="walk")
    measured = sorted((step for _, _, steps in found for step in steps), key=lambda step: step.index)
    walks = [(each, arrived) for (low, high), (each, arrived, _) in zip(mine, found, strict=True) if low < high]
    if len({each.restarts for each, _ in walks}) > 1:  # all start anew where nothing came back to any of them
        each, arrived, _ = walk(seeds, ())
        walks = [(each, arrived)]
    return joined([each for each, _ in walks]), _beside([arrived for _, arrived in walks]), measured


def _beside(parts: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """What arrived at every step, the cotangents of all parts side by side."""
    return tuple(
        None if any(part is None for part in step) else torch.cat([part for part in step if part is not None], 2)
        for step in zip(*parts, strict=True)
    )


class _Steps(Observer):
    """Measures the steps that are wanted, the last one first; their gain from cotangents of its own."""

    width = _GAIN_PROBES

    def __init__(self, flow: FlowLike, states: _States, wanted: Container[int], seed: int) -> None:
        self.measured: list[StepMeasurement] = []
        self._flow, self._states, self._wanted, self._seed = flow, states, wanted, seed
        self._sent = torch.empty(0)
        self._weights = Weights(flow) if isinstance(flow, Flow) else None

    def beside(self, step: StepLike) -> Tensor | None:
        """The random cotangents of its gain."""
        if step.index not in self._wanted:
            return None
        numbers = range(1, _GAIN_PROBES + 1)
        self._sent = drawn(space_at(self._flow, step.index + 1), [self._seed + _GAIN * k + step.index for k in numbers])
        return self._sent

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        """Measure the step."""
        if pulled is None:
            return
        step = passage.step
        before, after = self._states.log_rms[step.index], self._states.log_rms[step.index + 1]
        with np.errstate(invalid="ignore"):
            change = float((after - before).mean())
        finite = not self._states.finite[step.index] or self._states.finite[step.index + 1]
        spaces = [space_at(self._flow, index).sample_shapes for index in (step.index, step.index + 1)]
        measured = StepMeasurement(
            index=step.index,
            name=step.name,
            module_path=step.module_path,
            module_class=getattr(step, "module_class", ""),
            kind=step.kind,
            space=(spaces[0], spaces[1]),
            gain=(0.5 * (_energy(pulled) / _energy(self._sent)).log()).numpy(),
            log_change=change,
            finite=finite,
        )
        if self._weights is not None and isinstance(self._flow, Flow) and isinstance(step, Step):
            measured = _with_inside(measured, self._flow, step, self._seed, self._weights)
            if measured.norms:
                measured = replace(measured, owed=owed(step.source, pulled))
        self.measured.append(measured)


def _energy(columns: Tensor) -> Tensor:
    """Sum of squares per sample."""
    return norms(columns).square().sum(1)


def _with_inside(measured: StepMeasurement, flow: Flow, step: Step, seed: int, weights: Weights) -> StepMeasurement:
    """What only a recorded graph shows: branches, activations, parameters."""
    added = merges(flow, step, seed)
    log_branch, unchanged = _branch(step) if added and step.kind == "step" else (math.nan, 0.0)
    return replace(
        measured,
        log_branch=log_branch,
        unchanged=unchanged,
        merges=added,
        activities=activities(flow, step),
        weights=weights.of(step),
        norms=norms_in(flow, step),
        renormalised=ends_in_norm(flow, step),
    )


def _branch(step: Step) -> tuple[float, float]:
    """How much the step adds, and how much of the state it leaves alone."""
    before, after = (state.flatten().detach() for state in (step.source, step.target))
    rms = (after.double() - before.double()).square().mean(1).sqrt()
    return float(rms.clamp_min(1e-300).log().mean()), float((before == after).float().mean())
