"""A model at initialisation: what is measured beside what mean field theory expects of its own weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.expectations import Initialisation, StepExpectation
from stabkit.meanfield.gaussian import Array
from stabkit.meanfield.propagation import Energy, Moments, Propagation
from stabkit.meanfield.rates import FEWEST, Rate, fit_rate
from stabkit.meanfield.weights import WeightTable
from stabkit.tracing import Flow, State, trace
from stabkit.tracing.graph.values import Value
from stabkit.tracing.products.step_products import Space
from stabkit.walk import Cotangents, Observer, Passage, balanced, probe_seeds, walk_back, wide

_MAX_PAIRS = 4


@dataclass(frozen=True)
class _Measured:
    """Of one network: squared gradient norms ``(states, batch, probes)``, per value too, and steps that pass none."""

    flow: Flow
    squares: Array
    per_value: tuple[dict[Value, Array], ...]
    silent: frozenset[int]


@accepts
def at_initialisation(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    depth: Any = "auto",
    batch_dim: int | None = 0,
    probes: int = 8,
    others: Sequence[nn.Module] = (),
    seed: int = 0,
) -> Initialisation:
    """What a model does to signals and gradients, measured beside what mean field theory expects of its weights.

    Measured are the mean square of the units, the correlation of pairs of samples, and the squared gradient over depth
    (Hutchinson probes: standard normal cotangents of the last state). Expected are the same by the recursions of mean
    field theory through the operations of the recorded pass, with the mean square of the weights, that of the biases
    and the activations that the model has. An operation without a rule gets no expectation; the recursion starts anew
    from the state measured after it.

    Args:
        model: the model, not trained yet: theory assumes weights that do not depend on the data or on each other.
        *inputs: what it is called with; several samples give correlations and intervals.
        kwargs: keyword arguments of the call.
        depth: where steps end, as for `stabkit.trace`.
        batch_dim: which dimension counts samples, as for `stabkit.trace`.
        probes: random cotangents, at least 1.
        others: further networks from the same initialiser, measured too. With eight of them the interval of chi, and
            the gap between mean square and typical gradient, cover the randomness of the weights.
        seed: the seed of the cotangents.

    Raises:
        TraceError: the model cannot be recorded.
        ArgumentError: ``probes`` is not positive, or one of ``others`` has another depth.

    Source: Poole et al., NeurIPS 2016; Schoenholz et al., ICLR 2017; the partial Jacobian norm of Doshi et al., 2023.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(6)]
        >>> for layer in layers: _ = torch.nn.init.orthogonal_(layer.weight, 0.5)
        >>> found = at_initialisation(torch.nn.Sequential(*layers), torch.randn(4, 64))
        >>> round(found.rate.chi, 6), round(found.log_growth_expected / 6, 6)
        (0.25, -1.386294)
    """
    measured = []
    for network in (model, *others):
        flow = trace(network, *inputs, kwargs=kwargs, depth=depth, batch_dim=batch_dim, seed=seed)
        measured.append(_measure(flow, probes, seed))
    first = measured[0].flow
    for other in measured[1:]:
        if len(other.flow) != len(first):
            raise ArgumentError(
                f"others has a network of {len(other.flow)} steps; expected {len(first)} as in the model"
            )
    return _assemble(measured, probes, seed)


def _measure(flow: Flow, probes: int, seed: int) -> _Measured:
    columns = _drawn(flow.states[-1].space, probes, seed)
    squares = _Squares(flow)
    squares.note(flow.states[-1], balanced(columns))
    # nothing passes a head initialised at zero: what lies before it is measured with new cotangents
    walk = walk_back(flow, columns, probe_seeds(seed + 1, probes), renewal="together", observers=[squares])
    per_value = tuple(squares.found[::-1])
    totals = np.stack([np.sum(list(state.values()), axis=0) for state in per_value])
    silent = {*walk.restarts} if totals[0].any() else {0, *walk.restarts}
    return _Measured(flow, totals, per_value, frozenset(silent))


def _drawn(space: Space, probes: int, seed: int) -> Tensor:
    """Standard normal cotangents of a state, ``(batch, size, probes)``."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(space.batch, space.size, probes, generator=generator, dtype=torch.float64)
    return columns.to(dtype=space.dtype, device=space.device)


class _Squares(Observer):
    """Sums of squares of a gradient per sample and probe, for every value of the states, the last state first."""

    def __init__(self, flow: Flow) -> None:
        self.found: list[dict[Value, Array]] = []
        self._states = flow.states

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        """Note the state before the step; of new cotangents, where nothing came back."""
        self.note(self._states[passage.step.index], passage.continued)

    def note(self, state: State, cotangents: Cotangents) -> None:
        """Those of one state."""
        units = torch.exp2(2 * cotangents.powers)
        parts = torch.split(wide(cotangents.columns), state.space.sizes, dim=1)
        self.found.append(
            {
                value: (part.square().sum(1).cpu() * units).numpy()
                for value, part in zip(state.values, parts, strict=True)
            }
        )


def _state_moments(state: State, pairs: Any) -> dict[Value, Moments]:
    """Measured moments of every value of a state."""
    found = {}
    for value, tensor, meta, layout in zip(state.values, state.tensors, state.space.metas, state.layouts, strict=True):
        units = Space([meta], [layout]).flatten([tensor.unsqueeze(0)])[..., 0].double().cpu().numpy()
        products = np.mean(units[pairs[:, 0]] * units[pairs[:, 1]], axis=1)
        found[value] = Moments(pairs, np.mean(units**2, axis=1), units.mean(axis=1), products)
    return found


def _expect(measured: _Measured, log_chi: Array) -> tuple[tuple[StepExpectation, ...], Propagation]:
    """The recursion over the steps of one flow, beside what was measured."""
    flow = measured.flow
    pairs = np.array(list(itertools.pairwise(range(flow.batch))), dtype=np.int64).reshape(-1, 2)
    pairs = pairs[:: max(1, math.ceil(len(pairs) / _MAX_PAIRS))]
    propagation = Propagation(WeightTable(flow.model), flow.batch)
    states = [_state_moments(state, pairs) for state in flow.states]
    signals: list[dict[str, Any]] = []
    fresh = True
    _restart(propagation, states[0], 0)
    for step, state in zip(flow.steps, states[1:], strict=True):
        propagation.forward(step)
        after = {value: propagation.moments[value] for value in step.target.values}
        sizes = dict(zip(step.target.values, step.target.space.sizes, strict=True))
        signals.append(
            {
                "q": _mean_square(state, sizes),
                "q_expected": _number(_mean_square(after, sizes)),
                "c": _number(_correlation(state, sizes)),
                "c_expected": _number(_correlation(after, sizes)),
                "restarted": fresh,
            }
        )
        fresh = _restart(propagation, state, step.index + 1)
    gradients = zip(*_pull_back(measured, propagation), strict=True)
    steps = tuple(
        StepExpectation(
            index=step.index,
            name=step.name,
            kind=step.kind,
            activations=tuple(propagation.names(step)),
            layers=tuple(propagation.statistics(step)),
            **signal,
            log_chi=float(log_chi[step.index]),
            log_chi_expected=expected,
            width_variance=variance,
            reason=propagation.reasons.get(step.index, ""),
        )
        for step, signal, (expected, variance) in zip(flow.steps, signals, gradients, strict=True)
    )
    return steps, propagation


def _restart(propagation: Propagation, measured: dict[Value, Moments], index: int) -> bool:
    """Put measured moments where none are expected; what is measured may depend on all that the state depends on."""
    known = {v: propagation.moments[v] for v in measured if v in propagation.moments}
    sources = frozenset().union(*(m.sources for m in known.values()), [("state", index)])
    renewed = False
    for value, moments in measured.items():
        before = known.get(value)
        if before is None or np.isnan(before.q).any():
            propagation.moments[value] = dataclasses.replace(moments, sources=sources)
            renewed = True
        elif np.isnan(before.k).any():
            propagation.moments[value] = dataclasses.replace(before, k=moments.k)
    return renewed


def _pull_back(measured: _Measured, propagation: Propagation) -> tuple[list[float | None], list[float | None]]:
    """Expected growth of squared gradients, step by step from the output."""
    flow = measured.flow
    growth: list[float | None] = []
    variances: list[float | None] = []
    energies = {v: Energy(s.mean(1), 0.0) for v, s in measured.per_value[-1].items()}
    for step in reversed(flow.steps):
        before = np.sum([energy.total for energy in energies.values()], axis=0)
        pulled = propagation.backward(step, energies)
        after = np.sum([energy.total for energy in pulled.values()], axis=0) if pulled else before * np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            log_chi = float(np.log(after.mean() / before.mean()))
        growth.append(_number(log_chi))
        shares = [energy.total.mean() / after.mean() for energy in pulled.values()] if log_chi > -math.inf else []
        noise = sum(share**2 * energy.variance for share, energy in zip(shares, pulled.values(), strict=False))
        variances.append(_number(float(noise)) if shares else None)
        if growth[-1] is None:
            energies = {v: Energy(s.mean(1), 0.0) for v, s in measured.per_value[step.index].items()}
        else:
            energies = {v: Energy(energy.total / after.mean(), 0.0) for v, energy in pulled.items()}
    return growth[::-1], variances[::-1]


def _mean_square(moments: dict[Value, Moments], sizes: dict[Value, int]) -> float:
    total = sum(sizes.values())
    return float(sum(sizes[v] * m.q.mean() for v, m in moments.items()) / total)


def _correlation(moments: dict[Value, Moments], sizes: dict[Value, int]) -> float:
    """Normalised product of the units of two samples, the mean over pairs; NaN without pairs."""
    products = np.sum([sizes[v] * m.k for v, m in moments.items()], axis=0)
    squares = np.sum([sizes[v] * m.q for v, m in moments.items()], axis=0)
    pairs = next(iter(moments.values())).pairs
    if not len(pairs):
        return math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean(products / np.sqrt(squares[pairs[:, 0]] * squares[pairs[:, 1]])))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _assemble(measured: list[_Measured], probes: int, seed: int) -> Initialisation:
    flow = measured[0].flow
    squares = np.stack([m.squares.reshape(len(m.squares), -1) for m in measured])  # networks, states, draws
    silent = sorted(frozenset().union(*(m.silent for m in measured)))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_chi = -np.diff(np.log(squares.mean(axis=(0, 2))))
        typical = -np.diff(np.log(squares).mean(axis=(0, 2)))
    passing = [index for index in range(len(flow)) if index not in silent]
    growth, typical_growth = float(log_chi[passing].sum()), float(typical[passing].sum())
    log_chi[silent] = -np.inf
    steps, propagation = _expect(measured[0], log_chi)
    variance = _total([step.width_variance for step in steps])
    shared = ("some layers share their weights: theory takes them for independent",) if propagation.shared else ()
    return Initialisation(
        steps=steps,
        rate=_rate(flow, squares, silent),
        log_growth=growth,
        log_growth_expected=_total([step.log_chi_expected for step in steps]),
        typical_log_growth=typical_growth,
        gap=growth - typical_growth,
        gap_expected=None if variance is None else variance / 2,
        deviation=None if variance is None else math.sqrt(variance),
        samples=flow.batch,
        probes=probes,
        networks=len(measured),
        seed=seed,
        notes=(*flow.notes, *shared),
    )


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _rate(flow: Flow, squares: Array, silent: Sequence[int]) -> Rate | None:
    """The law over the longest run of states of one size."""
    runs: list[list[int]] = [[0]]
    for step in flow.steps:
        if step.kind == "step" and step.index not in silent:
            runs[-1].append(step.index + 1)
        else:
            runs.append([step.index + 1])
    longest = max(runs, key=len)
    chosen = squares[:, longest]
    if len(longest) < FEWEST or not (chosen > 0).all() or not np.isfinite(chosen).all():
        return None
    return fit_rate(chosen, longest[0])
