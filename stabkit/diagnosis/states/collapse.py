"""What the states themselves show: samples or tokens becoming one, and numbers that the dtype cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Array, Measurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.tracing import Flow, FlowLike, StateLike
from stabkit.tracing.graph.values import entries_are_finite

Indices = npt.NDArray[np.intp]
_FALL = 10.0  # factor by which the dispersion must fall over the stretch to be a collapse
_DIRECTIONS = 4  # entries of a vector from which its direction tells it apart
TELLS = "what tells {} apart"  # how the evidence of a collapse begins
_HEADROOM = math.log(1e3)  # that a gradient needs between its typical and its smallest or largest entries


@dataclass(frozen=True)
class Spread:
    """How much of the states tells samples, or the tokens of a sample, apart.

    Attributes:
        samples: ``(states,)``, 1 - |mean over samples|^2 / mean |x|^2; NaN for one sample.
        tokens: the same over the tokens of a sample, mean over samples; NaN where a state is no sequence.
    """

    samples: Array
    tokens: Array
    _states: Sequence[StateLike] = field(repr=False)

    @cached_property
    def rank(self) -> Array:
        """Effective rank of samples (or tokens) as vectors: exp of the entropy of their squared singular values.

        It asks for a decomposition of every state, so it is computed where a collapse is told, and not before.
        """
        return np.array([_effective_rank(state) for state in self._states])


def spread(flow: FlowLike) -> Spread:
    """Dispersion of every state, and on request its effective rank."""
    rows = [_dispersions(state) for state in flow.states]
    columns = np.array(rows, dtype=float).reshape(-1, 2).T
    return Spread(columns[0], columns[1], flow.states)


def _vectors(state: StateLike) -> tuple[Tensor, Tensor | None] | None:
    """A state as ``(samples, size)``, and a sequence also as ``(samples, tokens, size)``; None for no number."""
    flat = state.flatten().detach().to(device="cpu", dtype=torch.float64)
    if not entries_are_finite(flat) or not bool(flat.any()):
        return None
    axes = state.space.axes  # complex numbers have one more, and are no sequence
    return flat, flat.reshape(len(flat), *axes[0]) if len(axes) == 1 and len(axes[0]) == 2 else None


def _dispersions(state: StateLike) -> tuple[float, float]:
    found = _vectors(state)
    if found is None:
        return math.nan, math.nan
    flat, tokens = found
    by_sample = _dispersion(flat.unsqueeze(0)) if len(flat) > 1 else math.nan
    if (flat if tokens is None else tokens).shape[-1] < _DIRECTIONS:
        return math.nan, math.nan  # a head may well give all the same few numbers, as one that is sure
    return by_sample, math.nan if tokens is None or tokens.shape[1] < 2 else _dispersion(tokens)


def dispersion(samples: Tensor) -> float:
    """Share of the energy of samples ``(samples, ...)`` that tells them apart; NaN where they hold no number.

    Example:
        >>> dispersion(torch.tensor([[1.0, 1.0], [1.0, 1.0]])), dispersion(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        (0.0, 1.0)
    """
    flat = samples.detach().to(device="cpu", dtype=torch.float64).reshape(len(samples), -1)
    if not entries_are_finite(flat) or not bool(flat.any()):
        return math.nan
    return _dispersion(flat.unsqueeze(0))


def _dispersion(groups: Tensor) -> float:
    """1 - |mean|^2 / mean |x|^2 within every group ``(groups, members, d)``, averaged.

    Of the members as they are or of their directions, whichever is less: nodes of a graph that became alike still
    differ in size, by their degrees.
    """
    share = _share(groups)
    sizes = groups.norm(dim=2, keepdim=True)
    if groups.shape[2] < _DIRECTIONS or not bool((sizes > 0).all()):
        return share
    return min(share, _share(groups / sizes))


def _share(groups: Tensor) -> float:
    total = groups.square().sum(2).mean(1)
    centred = (groups - groups.mean(1, keepdim=True)).square().sum(2).mean(1)
    return float((centred / total.clamp_min(1e-300)).mean())


def _effective_rank(state: StateLike) -> float:
    """Roy and Vetterli, 2007, on at most 256 vectors; NaN where the state has no numbers."""
    found = _vectors(state)
    if found is None:
        return math.nan
    flat, tokens = found
    vectors = flat if tokens is None else tokens.flatten(0, 1)
    energy = torch.linalg.svdvals(vectors[:256]).square()
    share = energy / energy.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def collapse_finding(
    measurement: Measurement, found: Spread, stretch: tuple[int, int], thresholds: Thresholds
) -> list[Finding]:
    """Samples or tokens that arrive as one, although they entered as several."""
    first, last = stretch
    end = last if measurement.steps[last].kind == "transition" else last + 1  # a head may well forget what it pools
    while end == len(measurement.steps) and end > first + 1 and not measurement.steps[end - 1].weights:
        end -= 1  # a last activation, whose mean says nothing: a sigmoid begins at a half
    for what, values in (("tokens", found.tokens), ("samples", found.samples)):
        path = values[first : end + 1]
        usable = np.isfinite(path)
        if usable.sum() < 2:
            continue
        known = path[usable]
        # what fell below the limit is gone: rounding, or the degrees of a graph, bring a little back
        lowest = float(known.min())
        gone = lowest < thresholds.collapsed and known[-1] < _FALL * thresholds.collapsed
        if gone and known[0] > _FALL * max(known[-1], thresholds.collapsed):
            return [_collapse(measurement, what, values, found.rank, (first, end), thresholds)]
    return []


def _collapse(
    measurement: Measurement, what: str, values: Array, rank: Array, states: tuple[int, int], thresholds: Thresholds
) -> Finding:
    first, end = states
    below = np.flatnonzero(values[first : end + 1] < thresholds.collapsed)
    known = first + np.flatnonzero(np.isfinite(values[first : end + 1]))
    start, stop = int(known[0]), int(known[-1])
    where = first + max(int(below[0]) - 1, 0)
    steps = [step for step in measurement.steps[first:end] if step.kind == "step" and step.module_path]
    bare = [step.module_path for step in steps if not step.merges and step.weights]
    remedy = "give every block a skip, x + f(x), so that what tells them apart is carried on"
    return Finding(
        kind="rank_collapse",
        severity="warning",
        steps=tuple(range(first, end)),
        module_path=measurement.steps[where].module_path,
        confidence=1.0,
        evidence=f"{TELLS.format(what)} falls from {values[start]:.2g} of the energy of the state to "
        f"{values[stop]:.2g}, and the effective rank from {rank[start]:.3g} to {rank[stop]:.3g}; it is below "
        f"{thresholds.collapsed:g} from {measurement.steps[where].name} on",
        remedy=remedy if bare else "scale the branches up, or the part of the state that all share down",
        reference="Dong et al., Attention is not all you need, 2021; Schoenholz et al., 2017",
        numbers={"before": float(values[start]), "after": float(values[stop]), "rank": float(rank[stop])},
        actions=tuple(remedies.add_skip(path) for path in bare),
    )


def precision_findings(flow: FlowLike, measurement: Measurement) -> list[Finding]:
    """Numbers that the dtype of the model cannot hold, beside the scale that the network itself sets.

    A loss scale can move all gradients, but not bring them closer together: so it is their range over depth that is
    held against the range of the dtype, and the units of the loss do not matter.
    """
    dtype = flow.states[0].space.dtype
    limits = torch.finfo(dtype)
    room = math.log(limits.max) - math.log(limits.tiny) - _HEADROOM
    with np.errstate(invalid="ignore"):
        sizes = _log_gradient_rms(flow, measurement)
    held = np.flatnonzero(np.isfinite(sizes))
    found = []
    if held.size:
        reach = float(sizes[held].max() - sizes[held].min())
        if reach > room:
            found.append(_range_finding(measurement, held, sizes, reach, room, str(dtype)))
    states = measurement.log_states.max(axis=1)
    most = math.log(limits.max) - _HEADROOM
    over = np.flatnonzero(np.isfinite(states) & (states > most))
    if any(_read_size(flow, int(index)) > most for index in over):
        found.append(_state_finding(measurement, over, states, str(dtype)))
    under = underflow(flow, measurement)
    if under.size:
        found.append(_state_finding(measurement, under, states, str(dtype)))
    return found


def _read_size(flow: FlowLike, index: int) -> float:
    """Log of the largest entry of a state that anything behind it reads; -inf where nothing is read.

    A solver may set memory aside and write it later: until then it holds whatever numbers were there.
    """
    values = flow.states[index].flatten().detach()
    if not isinstance(flow, Flow) or index == len(flow.steps):
        return float(values.abs().max().double().log())
    operator = flow.jacobian(index)
    batch, rows, _ = operator.shape
    probe = torch.randn(batch, rows, 1, generator=torch.Generator().manual_seed(0)).to(values)
    reached = (operator.T @ probe).squeeze(-1) != 0
    return float(torch.where(reached, values.abs(), 0).max().double().log())


def underflow(flow: FlowLike, measurement: Measurement) -> Indices:
    """The states that are mostly lost to underflow: their size is less than the smallest normal number of their dtype.

    What comes after the first of them is zero, or a few bits; units there are not dead by their own fault.
    """
    states = measurement.log_states.max(axis=1)
    smallest = math.log(torch.finfo(flow.states[0].space.dtype).tiny)
    return np.flatnonzero(np.isfinite(states) & (states < smallest))


def _log_gradient_rms(flow: FlowLike, measurement: Measurement) -> Array:
    """Typical size of a gradient entry at every state, joined over restarts."""
    reached = np.isfinite(measurement.log_gradients)
    sums = np.where(reached, measurement.log_gradients, 0.0).sum(axis=1)
    logs: Array = np.where(reached.any(axis=1), sums / np.maximum(reached.sum(axis=1), 1), np.nan)
    logs -= 0.5 * np.log([max(state.size, 1) for state in flow.states])
    logs[: max(measurement.restarts, default=0)] = np.nan  # in other units than those behind
    return logs


def _range_finding(
    measurement: Measurement, held: Indices, sizes: Array, reach: float, room: float, dtype: str
) -> Finding:
    last = len(measurement.steps) - 1
    step = measurement.steps[min(int(held[int(np.argmin(sizes[held]))]), last)]
    lost = held[sizes[held] < sizes[held].max() - room]
    name = dtype.removeprefix("torch.")
    return Finding(
        kind="precision_loss",
        severity="warning",
        steps=tuple(sorted({min(int(state), last) for state in lost})),
        module_path=step.module_path,
        confidence=1.0,
        evidence=f"gradients of different depths lie {reach:.1f} nats apart, more than the {room:.1f} that {name} "
        f"leaves; under the best loss scale those at {step.name} still underflow",
        remedy="compute in float32 or bfloat16, and bring the growth over depth down: no loss scale helps",
        reference="Micikevicius et al., Mixed precision training, 2018",
        numbers={"range": reach, "room": room},
        actions=(remedies.convert("float32"),),
    )


def _below(dtype: str) -> str:
    return f"less than {torch.finfo(getattr(torch, dtype)).tiny:.3g}, the smallest normal number of {dtype}"


def _state_finding(measurement: Measurement, states: Indices, sizes: Array, dtype: str) -> Finding:
    step, size = measurement.steps[max(int(states[0]) - 1, 0)], float(sizes[states[0]])
    name = dtype.removeprefix("torch.")
    return Finding(
        kind="precision_loss",
        severity="warning",
        steps=tuple(sorted({max(int(state) - 1, 0) for state in states})),
        module_path=step.module_path,
        confidence=1.0,
        evidence=f"behind {step.name} the entries of the state are of size {math.exp(min(size, 700.0)):.3g}, "
        + (f"within a factor of a thousand of the largest number of {name}" if size > 0 else _below(name)),
        remedy=f"compute in float32 or bfloat16, or scale the states {'down' if size > 0 else 'up'} before this step",
        reference="Micikevicius et al., Mixed precision training, 2018",
        numbers={"log_size": size},
        actions=(remedies.convert("float32"),),
    )
