"""Everything that a diagnosis rests on, measured in one walk back through the flow.

Cotangents are brought back to unit size before every step, sample by sample and by powers of two, so that a loss in
other units, or a gradient that leaves the range of its dtype, gives the same growth to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabkit.diagnosis.activity import Activity, activities
from stabkit.diagnosis.branches import Merge, merges
from stabkit.diagnosis.weights import Weight, ends_in_norm, norms_in, weights_of
from stabkit.parallel import SERIAL, Parallel, runs
from stabkit.tracing import Flow, FlowLike, StateLike, Step, StepLike
from stabkit.tracing.samples import scale

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StepMeasurement:
    """What one step did to states and cotangents.

    Attributes:
        index: of the step.
        name: of the step.
        module_path: of the step.
        module_class: of that module.
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

    @property
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
    """

    steps: tuple[StepMeasurement, ...]
    growth: Array
    log_gradients: Array
    log_states: Array
    restarts: tuple[int, ...]
    loss: str
    probes: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every step."""
        return tuple(step.kind for step in self.steps)


def measure(
    flow: FlowLike, loss: object = None, *, probes: int = 4, seed: int = 0, parallel: Parallel = SERIAL
) -> Measurement:
    """Growth, gains, branches, activity and weights of every step.

    Args:
        flow: a traced forward pass, or an iterated map.
        loss: a callable on the model's output that returns a scalar. None pulls back ``probes`` random cotangents.
        probes: random cotangents per sample when there is no loss; with one, it alone is pulled back.
        seed: of the cotangents.
        parallel: who pulls back which cotangents, and measures which steps.
    """
    seeds = [seed] if loss is not None else [seed + 1_000_003 * probe for probe in range(probes)]
    carried, measured = _shared_walks(flow, loss, seeds, seed, parallel)
    name = f"{probes} standard normal cotangents per sample"
    return Measurement(
        steps=tuple(measured),
        growth=carried.growth,
        log_gradients=carried.log_gradients,
        log_states=np.stack([log_rms(state) for state in flow.states]),
        restarts=carried.restarts,
        loss=name if loss is None else getattr(loss, "__name__", type(loss).__name__),
        probes=len(seeds),
    )


@dataclass(frozen=True)
class _Walk:
    """What became of some cotangents on their way back through the flow; columns as in `Measurement`."""

    growth: Array
    log_gradients: Array
    restarts: tuple[int, ...]


def _shared_walks(
    flow: FlowLike, loss: object, seeds: Sequence[int], seed: int, parallel: Parallel
) -> tuple[_Walk, list[StepMeasurement]]:
    """Everyone walks back with some of the cotangents and measures some of the steps on the way."""
    count = len(flow.steps)
    mine = runs(len(seeds), parallel.count)

    def walk(part: int) -> tuple[_Walk | None, list[StepMeasurement]]:
        low, high = mine[part]
        return _walk(flow, loss, seeds[low:high], range(part, count, parallel.count), seed)

    found = parallel.share(walk, [1.0] * parallel.count, name="walk")
    walks = [carried for carried, _ in found if carried is not None]
    measured = sorted((step for _, steps in found for step in steps), key=lambda step: step.index)
    if len({carried.restarts for carried in walks}) > 1:  # cotangents start anew where nothing came back to any of them
        carried, _ = _walk(flow, loss, seeds, (), seed)
        walks = [] if carried is None else [carried]
    return _beside(walks), measured


def _beside(walks: Sequence[_Walk]) -> _Walk:
    growth, gradients = (np.concatenate([getattr(w, name) for w in walks], 1) for name in ("growth", "log_gradients"))
    return _Walk(growth, gradients, walks[0].restarts)


def _walk(
    flow: FlowLike, loss: object, seeds: Sequence[int], wanted: Container[int], seed: int
) -> tuple[_Walk | None, list[StepMeasurement]]:
    """One walk back with one cotangent a seed, which measures the steps that are wanted; no walk without seeds."""
    cotangents = [_Carried(flow.states[-1], flow.cotangent(loss, seed=each)) for each in seeds]
    gradients = [[c.log_norms for c in cotangents]]
    cotangents = [c.renewed(each + len(flow.steps)) for c, each in zip(cotangents, seeds, strict=True)]
    growth: list[list[Array]] = []
    measured: list[StepMeasurement] = []
    restarts = []
    steps: Sequence[StepLike] = flow.steps
    for step in reversed(steps):
        if not (cotangents or step.index in wanted):
            continue
        pull = _pullback(step)
        before = [_Carried(step.source, pull(c.tensors), c.shift, c.silent) for c in cotangents]
        growth.append([_difference(b.log_norms, c.log_norms) for b, c in zip(before, cotangents, strict=True)])
        if step.index in wanted:
            measured.append(_measure_step(flow, step, pull, seed))
        if step.index > 0 and before and all(b.silent.all() for b in before):
            before = [_Carried(step.source, _drawn(step.source, each + step.index)) for each in seeds]
            restarts.append(step.index)
        gradients.append([np.where(b.silent, -np.inf, b.log_norms) for b in before])
        cotangents = [b.renewed(each + step.index) for b, each in zip(before, seeds, strict=True)]
    if not cotangents:
        return None, measured
    rows = np.stack([np.concatenate(row) for row in growth[::-1]]) if growth else np.zeros((0, 1))
    columns = np.stack([np.concatenate(row) for row in gradients[::-1]])
    return _Walk(rows, columns, tuple(sorted(restarts))), measured


class _Carried:
    """A cotangent of about unit size per sample, with the logarithm of what was taken out of it.

    A sample is silent from where nothing comes back to it, also when its cotangent was drawn anew since.
    """

    def __init__(
        self, state: StateLike, tensors: Sequence[Tensor], shift: Array | None = None, silent: Mask | None = None
    ) -> None:
        norms = _norms(state, tensors)
        self.state = state
        self.shift = np.zeros(len(norms)) if shift is None else shift
        self.silent = (norms == 0) | (False if silent is None else silent)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.log_norms = np.log(norms) + self.shift
        usable = np.isfinite(norms) & (norms > 0)
        exponents = np.where(usable, np.round(np.log2(np.where(usable, norms, 1.0))), 0.0)
        exponents = np.clip(exponents, -120, 120)  # the factor itself must be a number of every dtype
        limit = 15 if any(t.dtype == torch.float16 for t in tensors) else 120
        exponents = np.clip(exponents, -limit, limit)
        if exponents.any():
            factors = torch.from_numpy(np.exp2(-exponents))
            layouts = state.space.layouts
            tensors = [scale(t.detach(), layout, factors) for t, layout in zip(tensors, layouts, strict=True)]
        self.shift = self.shift + exponents * math.log(2.0)
        self.tensors = list(tensors)

    def renewed(self, seed: int) -> _Carried:
        """The same, with a new random cotangent for the samples that have none: what lies before is measured too."""
        gone = np.isneginf(self.log_norms)
        if not gone.any():
            return self
        space, chosen = self.state.space, torch.from_numpy(gone)[:, None, None]
        drawn, kept = (
            space.flatten([t.detach().unsqueeze(0) for t in ts]) for ts in (_drawn(self.state, seed), self.tensors)
        )
        mixed = space.unflatten(torch.where(chosen.to(kept.device), drawn, kept))
        return _Carried(self.state, [t.squeeze(0) for t in mixed], self.shift, self.silent)


def _norms(state: StateLike, tensors: Sequence[Tensor]) -> Array:
    columns = state.space.flatten([t.detach().unsqueeze(0) for t in tensors]).squeeze(-1)
    norms: Array = torch.linalg.vector_norm(columns.to(torch.float64), dim=1).cpu().numpy()
    return norms


def _difference(numerator: Array, denominator: Array) -> Array:
    """``numerator - denominator`` of logarithms; NaN for nothing over nothing."""
    with np.errstate(invalid="ignore"):
        return numerator - denominator


def _drawn(state: StateLike, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    space = state.space
    columns = torch.randn(space.batch, space.size, 1, generator=generator, dtype=torch.float64)
    return [t.squeeze(0) for t in space.unflatten(columns.to(device=space.device, dtype=space.dtype))]


def log_rms(state: StateLike) -> Array:
    """Log of the root mean square of a state's entries, per sample."""
    flat = state.flatten().detach().to(torch.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(flat.square().mean(1).sqrt().log().cpu().numpy())


def _pullback(step: StepLike) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Products with J^T of one step; a step of an iterated map is recorded once for all of them."""
    if isinstance(step, Step):
        return step.vjp
    J, space = step.jacobian(), step.source.space

    def pull(tensors: Sequence[Tensor]) -> list[Tensor]:
        columns = space.flatten([tensor.unsqueeze(0) for tensor in tensors])
        return [tensor.squeeze(0) for tensor in space.unflatten(J.rmatmat(columns))]

    return pull


def _measure_step(
    flow: FlowLike, step: StepLike, pull: Callable[[Sequence[Tensor]], list[Tensor]], seed: int
) -> StepMeasurement:
    pulled = [_norms(step.source, pull(_drawn(step.target, seed + 7919 * k + step.index))) for k in (1, 2)]
    sent = [_norms(step.target, _drawn(step.target, seed + 7919 * k + step.index)) for k in (1, 2)]
    with np.errstate(divide="ignore", invalid="ignore"):
        gain: Array = 0.5 * np.log(sum(p**2 for p in pulled) / sum(s**2 for s in sent))
        change = float((log_rms(step.target) - log_rms(step.source)).mean())
    measured = StepMeasurement(
        index=step.index,
        name=step.name,
        module_path=step.module_path,
        module_class=getattr(step, "module_class", ""),
        kind=step.kind,
        space=(step.source.sample_shapes, step.target.sample_shapes),
        gain=gain,
        log_change=change,
        finite=not _finite(step.source) or _finite(step.target),
    )
    return _with_inside(measured, flow, step, seed) if isinstance(flow, Flow) and isinstance(step, Step) else measured


def _with_inside(measured: StepMeasurement, flow: Flow, step: Step, seed: int) -> StepMeasurement:
    """What only a recorded graph shows: branches, activations, parameters."""
    added = merges(flow, step, seed)
    log_branch, unchanged = _branch(step) if added and step.kind == "step" else (math.nan, 0.0)
    return replace(
        measured,
        log_branch=log_branch,
        unchanged=unchanged,
        merges=added,
        activities=activities(flow, step),
        weights=weights_of(flow, step),
        norms=norms_in(flow, step),
        renormalised=ends_in_norm(flow, step),
    )


def _branch(step: Step) -> tuple[float, float]:
    """How much the step adds, and how much of the state it leaves alone."""
    before, after = (state.flatten().detach() for state in (step.source, step.target))
    rms = (after.double() - before.double()).square().mean(1).sqrt()
    return float(rms.clamp_min(1e-300).log().mean()), float((before == after).float().mean())


def _finite(state: StateLike) -> bool:
    return all(bool(t.isfinite().all()) for t in state.tensors)
