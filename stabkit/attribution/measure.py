"""`attribute` and `mechanisms`: one walk back through the flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.attribution.explained_share import Prediction, compare
from stabkit.attribution.mechanism import TOLERANCE, Mechanism
from stabkit.attribution.persistence import ISOTROPIC, Persistence, cosine_of_modes, field_cosines, straightness
from stabkit.attribution.result import COLUMNS, Attribution
from stabkit.attribution.shared_modes import Modes, along_depth, mode_shares
from stabkit.attribution.step_mechanism import damping_limit, mechanism_of
from stabkit.attribution.step_terms import Budget, Terms, measure_step, skip_of
from stabkit.errors import ArgumentError
from stabkit.identification import Identification, by_step, identify
from stabkit.jacobians.method_choice import DENSE_SIZE
from stabkit.jacobians.shared import SharedSpectra
from stabkit.parallel import SERIAL, Parallel, runs
from stabkit.tracing import Flow
from stabkit.tracing.flow_checks import traced
from stabkit.walk import SMALL, Arrivals, Pulled, loss_columns, probe_seeds, random_columns, walk_back

COTANGENTS = 4  # random ones, where there is no loss: as many as `analyze` pulls back by default
EXPLAINED, EXPLAINED_PROBES = 4, 8  # samples, and random vectors behind large steps, of what a report says


@accepts
def attribute(
    flow: Flow,
    loss: Any = None,
    *,
    seed: int = 0,
    samples: int | None = None,
    dense_limit: int = DENSE_SIZE,
    probes: int = 16,
    krylov: int = 4,
    confidence: float = 0.95,
    tolerance: float = TOLERANCE,
    identifications: Sequence[Identification] | None = None,
    pulled: Pulled | None = None,
    spectra: SharedSpectra | None = None,
    parallel: Parallel = SERIAL,
) -> Attribution:
    """Measured growth of the gradient at every step as an exact sum of named terms.

    States of up to ``dense_limit`` numbers are treated exactly, from their matrix and all its eigenvalues (about
    2 d^3 ns per sample and step). Larger ones are estimated from ``probes`` random cotangents with Student intervals,
    and their spectral term is bracketed.

    Args:
        flow: a traced forward pass.
        loss: a callable on the model's output that returns a scalar; None pulls back four standard normal cotangents
            and explains their mean growth, as `stabkit.analyze` does.
        seed: the seed of those cotangents, of the probes and of the start vectors.
        samples: how many samples, from the first; all by default.
        dense_limit: the largest state that is treated exactly.
        probes: random cotangents for larger states.
        krylov: eigenvalues of largest modulus that are sought for larger states; 0 for none, which is much cheaper.
        confidence: the confidence level of the intervals.
        tolerance: how far the modulus of an eigenvalue may exceed 1 before its mode counts as unstable.
        identifications: from ``identify(flow)``; made here by default.
        pulled: the cotangents on their way back, where they are known (``measurement.pulled`` of a diagnosis); for
            this loss and seed.
        spectra: matrices and eigenvalues of the steps by index, where others want them too; made here by default.
        parallel: who measures which steps.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: ``flow`` is no flow.
        TraceError: it is an iterated map; or the loss is not a differentiable scalar of the output that it leads to.

    Example:
        >>> import torch, stabkit
        >>> class Block(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + x @ torch.tensor([[-0.5, 0.0], [0.6, -0.5]])
        >>> flow = stabkit.trace(torch.nn.Sequential(Block(), Block()), torch.ones(1, 2))
        >>> found = stabkit.attribute(flow, lambda out: out[:, 0].sum())
        >>> [round(float(x), 4) for x in (found.growth[1, 0], found.spectral[1, 0], found.non_normal[1, 0])]
        [-0.2471, -0.6931, 0.2712]
        >>> round(found.mechanisms[0].largest_step_factor, 6)
        4.0
    """
    flow = traced(flow, "attribute")
    _check(flow, samples, dense_limit, probes, krylov, confidence)
    budget = Budget(dense_limit, probes, krylov, confidence, samples or flow.batch, seed)
    if pulled is None or not _serves(pulled, budget):
        pulled = pulled_back(flow, loss, seed=seed, samples=budget.samples, limit=dense_limit)
    read = identify(flow, checks=False) if identifications is None else identifications
    found = by_step(read, len(flow.steps))
    if spectra is None or spectra.samples < budget.samples:
        spectra = SharedSpectra(lambda index: flow.steps[index].jacobian(), budget.samples)
    terms, cosines = _shared_terms(flow, found, pulled, budget, spectra, parallel)
    columns = {column: torch.stack([t.columns[column] for t in terms]) for column in COLUMNS}
    straight, run = straightness(flow)
    persistence = Persistence(cosines, field_cosines(flow, [skip_of(f) for f in found]), straight, run)
    return Attribution(
        **columns,
        spectral_interval=torch.stack([t.spectral_interval for t in terms]),
        isotropic_interval=torch.stack([t.isotropic_interval for t in terms]),
        methods=tuple(t.method for t in terms),
        names=tuple(step.name for step in flow.steps),
        module_paths=tuple(step.module_path for step in flow.steps),
        kinds=tuple(step.kind for step in flow.steps),
        mechanisms=_mechanisms(flow, found, terms, tolerance),
        persistence=persistence,
        predictions=_predictions(columns, terms, persistence, flow, None if loss is None else pulled, spectra),
        restarts=pulled.restarts,
        loss=pulled.loss,
        seed=seed,
        confidence=confidence,
        notes=tuple(t.notes for t in terms),
    )


def _serves(pulled: Pulled, budget: Budget) -> bool:
    """Whether cotangents that were pulled back before are kept for as many samples and as large steps as wanted."""
    return budget.dense_limit <= SMALL and budget.samples <= pulled.growth.shape[1]


def mechanisms(flow: Flow, *, loss: Any = None, **options: Any) -> tuple[Mechanism, ...]:
    """The mechanism of every step in the z plane; the same as ``attribute(flow, loss, **options).mechanisms``.

    Example:
        >>> import torch, stabkit
        >>> class Block(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + x @ torch.diag(torch.tensor([0.1, -2.5, -0.9, -0.1]))
        >>> flow = stabkit.trace(torch.nn.Sequential(Block(), Block()), torch.ones(1, 4))
        >>> modes = mechanisms(flow)[0].modes
        >>> modes.continuous, modes.discretisation, modes.overdamped, modes.neutral
        (0.25, 0.25, 0.25, 0.25)
    """
    return attribute(flow, loss, **options).mechanisms


def _check(flow: Flow, samples: int | None, dense_limit: int, probes: int, krylov: int, confidence: float) -> None:
    if samples is not None and not 1 <= samples <= flow.batch:
        raise ArgumentError(f"samples={samples}; the flow has {flow.batch}: give 1 to {flow.batch}, or None for all")
    if dense_limit < 0:
        raise ArgumentError(f"dense_limit={dense_limit}; expected the size of a state, or 0 to estimate every step")
    if probes < 2:
        raise ArgumentError(f"probes={probes}; expected at least 2, an interval needs a spread")
    if krylov < 0:
        raise ArgumentError(f"krylov={krylov}; expected how many eigenvalues to look for, or 0 for none")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence}; expected a probability between 0 and 1, such as 0.95")


def pulled_back(
    flow: Flow, loss: Any = None, *, seed: int = 0, samples: int | None = None, limit: int = SMALL
) -> Pulled:
    """The cotangents that `attribute` explains, as `stabkit.analyze` pulls them back by default.

    Args:
        flow: a traced forward pass.
        loss: a callable on the model's output that returns a scalar; None pulls back standard normal cotangents.
        seed: the seed of them, and of those that are drawn anew where nothing comes back.
        samples: how many samples, from the first; all by default.
        limit: the largest step at which cotangents are kept.
    """
    seeds = probe_seeds(seed, COTANGENTS if loss is None else 1)
    columns = random_columns(flow, seeds) if loss is None else loss_columns(flow, [loss])
    count = samples or flow.batch
    arrivals = Arrivals(len(flow), count, limit)
    walk = walk_back(flow, columns, seeds, renewal="each", observers=[arrivals])
    words = f"{COTANGENTS} standard normal cotangents per sample"
    words = words if loss is None else getattr(loss, "__name__", type(loss).__name__)
    return Pulled.of(walk, arrivals.columns, count, words)


def _shared_terms(
    flow: Flow,
    found: Sequence[Identification],
    pulled: Pulled,
    budget: Budget,
    spectra: SharedSpectra,
    parallel: Parallel,
) -> tuple[list[Terms], Tensor]:
    """The terms of every step, and the cosine of each step with the next one; by runs of steps."""
    parts = [run for run in runs(len(flow.steps), parallel.count) if run[0] < run[1]]

    def measured(part: int) -> tuple[list[Terms], Tensor]:
        return _terms(flow, found, pulled, budget, spectra, parts[part])

    done = parallel.share(measured, [1.0] * len(parts), name="run of steps")
    return [term for terms, _ in done for term in terms], torch.cat([cosines for _, cosines in done])


def _terms(
    flow: Flow,
    found: Sequence[Identification],
    pulled: Pulled,
    budget: Budget,
    spectra: SharedSpectra,
    run: tuple[int, int],
) -> tuple[list[Terms], Tensor]:
    """Those of a run of steps, from its first to one before its end; the step at its end is there to be compared."""
    first, end = run
    cosines = torch.full((end - first,), float("nan"), dtype=torch.float64)
    terms: list[Terms] = []
    following: Tensor | None = None
    for step in reversed(flow.steps[first : end + 1]):
        growth, arriving = pulled.growth[step.index, : budget.samples], pulled.arriving[step.index]
        arriving = None if arriving is None else arriving[: budget.samples]
        measured = measure_step(step, found[step.index], growth, arriving, budget, spectra)
        if step.index < end:
            if following is not None and measured.deviation is not None and following.shape == measured.deviation.shape:
                cosines[step.index - first] = cosine_of_modes(measured.deviation, following)
            terms.append(_without_deviation(measured))
        following = measured.deviation
        step.segment.release()
    return terms[::-1], cosines


def _without_deviation(terms: Terms) -> Terms:
    return replace(terms, deviation=None)


def _mechanisms(
    flow: Flow,
    found: Sequence[Identification],
    terms: Sequence[Terms],
    tolerance: float,
) -> tuple[Mechanism, ...]:
    damped = damping_limit(sum(step.kind == "step" for step in flow.steps))
    return tuple(
        mechanism_of(
            step,
            found[i],
            terms[i].spectrum,
            damped_below=damped,
            tolerance=tolerance,
        )
        for i, step in enumerate(flow.steps)
    )


def _predictions(
    columns: Mapping[str, Tensor],
    terms: Sequence[Terms],
    persistence: Persistence,
    flow: Flow,
    of_loss: Pulled | None,
    spectra: SharedSpectra,
) -> dict[str, Prediction]:
    """Every predictor over the blocks: steps that keep their space and belong to no stem or head.

    Random cotangents are spread evenly over the modes; how the gradient of a loss is, ``of_loss`` shows.
    """
    blocks = torch.tensor([step.kind == "step" for step in flow.steps])
    blocks = blocks & columns["spectral"].isfinite().all(1)
    nan = torch.full_like(columns["growth"], float("nan"))
    last = int(blocks.nonzero().max()) if bool(blocks.any()) else -1
    start = None if of_loss is None else _entering(last, terms, persistence, of_loss, spectra)

    def carried(isotropic: Tensor) -> Tensor:
        modes = [
            Modes(
                values=term.values,
                size=step.source.size,
                mean=term.mean,
                isotropic=isotropic[step.index],
                spectral=columns["spectral"][step.index],
                cosine=persistence.at(step.index),
                start=start if step.index == last else None,
            )
            if bool(blocks[step.index])
            else None
            for step, term in zip(flow.steps, terms, strict=True)
        ]
        return along_depth(modes).expand_as(nan)

    predicted = {name: columns[name] for name in ("spectral", "isotropic", "frozen")}
    predicted |= {"persistent": carried(columns["isotropic"]), "eigenvalues": carried(columns["spectral"])}
    return {
        name: compare(name, torch.where(blocks[:, None], rate, nan), columns["growth"])
        for name, rate in predicted.items()
    }


def _entering(
    last: int, terms: Sequence[Terms], persistence: Persistence, pulled: Pulled, spectra: SharedSpectra
) -> tuple[Tensor, Tensor] | None:
    """How the gradients that enter the blocks are spread over the modes of the last of them.

    None where it is not known, or would soon be forgotten: modes of unrelated steps have nothing in common.
    """
    if last < 0 or not persistence.mean > ISOTROPIC:
        return None
    values, arriving = terms[last].values, pulled.arriving[last]
    if values is None or arriving is None or terms[last].method != "dense":
        return None
    count = len(values)
    J = spectra.matrix(last)[:count].detach().to(device="cpu", dtype=torch.float64)
    cotangents = arriving[:count]
    known = J.isfinite().all() and cotangents.isfinite().all() and (cotangents != 0).any(1).all()
    return mode_shares(J, cotangents) if bool(known) else None
