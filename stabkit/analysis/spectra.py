"""The spectrum of one step of a report: eigenvalues against the region of its method, and the worst growth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from stabkit.analysis import work
from stabkit.diagnosis import Diagnosis
from stabkit.errors import ArgumentError, TraceError
from stabkit.identification import Identification
from stabkit.jacobians import Jacobian, Spectrum, eigenvalues, from_dense, singular_values
from stabkit.jacobians.method_choice import DENSE_SIZE, LARGEST_DENSE, krylov_products
from stabkit.jacobians.numerical_range import outline
from stabkit.jacobians.shared import SharedSpectra
from stabkit.planning.predicted_cost import TRAINING_STEPS
from stabkit.report.schema import ROUNDING
from stabkit.tracing import Flow, Step, same_space

_WANTED = 6  # eigenvalues and singular values of larger steps
_PER_VALUE = 10  # products from which one more eigenvalue is looked for
_DIRECTIONS = 32  # around the numerical range
_TOLERANCE = 1e-3  # residual of a Krylov value, as a fraction of the norm of J
_LAPACK = 15.0  # operations of a whole spectrum with vectors, times the cube of the size


@dataclass(frozen=True)
class SpectrumFigures:
    """What a report says of the spectrum of one step's Jacobian; None where it was not computed."""

    z: tuple[complex, ...] | None = None
    numerical_range: tuple[complex, ...] | None = None
    radius: float | None = None
    norm: float | None = None
    outside: float | None = None
    method: str = "none"
    converged: bool = False
    notes: tuple[str, ...] = ()


def by_importance(diagnosis: Diagnosis) -> list[int]:
    """Indices of the steps: those of the findings first, the worst before the others, then those of most growth."""
    accused = [index for finding in diagnosis.findings if len(finding.steps) <= 2 for index in finding.steps]
    growth = np.abs(diagnosis.measurement.growth.mean(axis=1))
    rest = np.argsort(-np.nan_to_num(growth, nan=np.inf), kind="stable")
    return list(dict.fromkeys([*accused, *map(int, rest)]))


@dataclass(frozen=True)
class StepSpectra:
    """The spectra of all steps, as many as the work allows.

    Attributes:
        flow: the whole batch.
        short: the samples whose spectra are wanted, where they can be had alone; else the same.
        mode: ``"auto"``, ``"full"``, ``"dense"``, ``"krylov"`` or ``"none"``.
        samples: how many samples' spectra are computed, from the first.
        shared: matrices and eigenvalues of small steps of the flow, by index.
        products: what an iteration may spend on each step, by index; steps without an entry are left out.
        costs: the cost of every step, in operations.
        seed: the seed of the start vectors.
        notes: what was left out, in a sentence.
    """

    flow: Flow
    short: Flow
    mode: str
    samples: int
    shared: SharedSpectra
    products: Mapping[int, int]
    costs: Mapping[int, float]
    seed: int
    notes: tuple[str, ...] = field(default=())

    def of(self, index: int, method: Identification) -> SpectrumFigures:
        """The eigenvalues and the largest singular value of a step; why there are none is said in its notes."""
        step = self.flow.steps[index]
        if self.mode == "none":
            return SpectrumFigures()
        if is_dense(step, self.mode):
            return self._dense(step, method)
        if index not in self.products:
            return SpectrumFigures(notes=("no spectrum: left out to keep the work of the report small",))
        short = self.short.steps[index]
        J = _first_samples(short.jacobian(), self.samples)
        found = _from_products(J, step, method, self.products[index], self.seed)
        short.segment.release()
        return found

    def _dense(self, step: Step, method: Identification) -> SpectrumFigures:
        n, size = step.source.size, max(step.source.size, step.target.size)
        try:
            if size > LARGEST_DENSE:
                raise ArgumentError(
                    f"a dense spectrum of {size} numbers is too large (at most {LARGEST_DENSE}): use krylov"
                )
            shared = size <= DENSE_SIZE
            J = self.shared.matrix(step.index)[: self.samples] if shared else self._own_matrix(step)
            largest = singular_values(J, seed=self.seed, method="dense")
            if not same_space(step.source, step.target):
                return _only_norm(largest, "dense")
            count = len(J)
            spectra = (
                [self.shared.eigenvalues(step.index, sample) for sample in range(count)]
                if shared
                else [eigenvalues(J, seed=self.seed, method="dense")]
            )
        except (ValueError, ArithmeticError, TraceError) as error:
            return _none(error)
        values = torch.cat([one.values for one in spectra])
        converged = torch.cat([one.converged for one in spectra])
        a = _skip(method)
        around = _numerical_range(from_dense(J), a) if shared else None
        return replace(_summarise(values, converged, largest, a, n, "dense"), numerical_range=around)

    def _own_matrix(self, step: Step) -> torch.Tensor:
        short = self.short.steps[step.index]
        return _first_samples(short.jacobian(), self.samples).dense()


def plan_spectra(
    flow: Flow,
    short: Callable[[], Flow],
    order: Sequence[int],
    *,
    mode: str,
    samples: int,
    share: float,
    shared: SharedSpectra,
    seed: int,
) -> StepSpectra:
    """What every step's spectrum may cost.

    Args:
        flow: the whole batch.
        short: gives the flow of the samples whose spectra are wanted; called only if iterations are needed.
        order: indices of the steps, the most important first.
        mode: how spectra are computed.
        samples: how many samples' spectra are computed.
        share: part of the work of a default report that may be spent.
        shared: matrices and eigenvalues of small steps.
        seed: the seed of the start vectors.
    """
    costs = {
        step.index: _LAPACK * samples * max(step.source.size, step.target.size, 1) ** 3
        for step in flow.steps
        if mode != "none" and is_dense(step, mode)
    }
    iterated = [] if mode == "none" else [index for index in order if index not in costs]
    few, notes = flow, tuple[str, ...]()
    products: dict[int, int] = {}
    if iterated:
        demands = {step.index: work.demand(step) for step in flow.steps}
        if work.pays_to_shorten(flow, samples, [demands[index] for index in iterated]):
            few = short()
        if few is not flow:  # which it stays where the samples cannot be had alone
            demands = {step.index: work.demand(step) for step in few.steps}
        wanted = [demands[index] for index in iterated]
        limit = share * _limit(flow, few, demands, wanted, mode)
        products = work.allot(wanted, limit)
        costs |= {index: demands[index].cost * count for index, count in products.items()}
        notes = _left_out(wanted, products)
    return StepSpectra(flow, few, mode, samples, shared, products, costs, seed, notes)


def _limit(
    flow: Flow, few: Flow, demands: Mapping[int, work.Demand], wanted: Sequence[work.Demand], mode: str
) -> float:
    whole = sum(one.cost * one.products for one in wanted)
    if mode != "auto":
        return whole
    return min(whole, TRAINING_STEPS * work.training_step(flow, few.batch, demands))


def _left_out(wanted: Sequence[work.Demand], products: Mapping[int, int]) -> tuple[str, ...]:
    without = [one.index for one in wanted if one.index not in products]
    fewer = [one.index for one in wanted if one.index in products and products[one.index] < one.products]
    if not (without or fewer):
        return ()
    most = max(one.products for one in wanted)
    parts = []
    if without:
        parts.append(f"{len(without)} of {len(wanted)} large steps, those of least growth, have none")
    if fewer:
        spent = max(products[index] for index in fewer)
        alone = ", for the largest singular value alone" if spent < work.LEAST else ""
        parts.append(f"{len(fewer)} stop after {spent} products with the Jacobian instead of {most}{alone}")
    return (f'spectra were kept cheap: {"; ".join(parts)}; spectrum="full" computes everything',)


def is_dense(step: Step, mode: str) -> bool:
    """Whether all eigenvalues of a step are computed from its matrix."""
    return mode == "dense" or (mode in ("auto", "full") and max(step.source.size, step.target.size) <= DENSE_SIZE)


def _from_products(J: Jacobian, step: Step, method: Identification, products: int, seed: int) -> SpectrumFigures:
    """A step's outer eigenvalues and largest singular value, from its products alone; few go to the latter."""
    most = krylov_products(max(J.shape[1:]))
    keeps_space, enough = same_space(step.source, step.target), products >= min(work.LEAST, most)
    try:
        largest = singular_values(
            J,
            1,
            tol=_TOLERANCE,
            seed=seed,
            method="golub-kahan",
            max_products=min(most, products * 2 // 3) if keeps_space and enough else products,
        )
        if not (keeps_space and enough):
            return _only_norm(largest, "krylov")
        left = min(most, products - largest.n_products)
        found = eigenvalues(
            J,
            min(_WANTED, J.shape[2], max(1, left // _PER_VALUE)),
            tol=_TOLERANCE,
            seed=seed,
            method="krylov-schur",
            max_products=left,
            two_sided=False,
        )
    except (ValueError, ArithmeticError, TraceError) as error:
        return _none(error)
    return _summarise(found.values, found.converged, largest, _skip(method), J.shape[2], "krylov")


def _none(error: Exception) -> SpectrumFigures:
    """Weights that are not finite, or an operation without a certified product: a fact about the step, no failure."""
    return SpectrumFigures(notes=(f"no spectrum: {str(error).splitlines()[0]}",))


def _only_norm(largest: Spectrum, method: str) -> SpectrumFigures:
    converged = bool(largest.converged.all())
    notes = () if converged else ("the largest singular value has not converged: it is a lower bound",)
    return SpectrumFigures(norm=_maximum(largest.values), method=method, converged=converged, notes=notes)


def _skip(method: Identification) -> float:
    return 0.0 if method.skip is None else method.skip


def _numerical_range(J: Jacobian, a: float) -> tuple[complex, ...]:
    """Around the numerical range of J - a at the first sample."""
    A = J.dense()[0].double().cpu().numpy()
    return tuple(complex(w) - a for w in outline(A, _DIRECTIONS))


def _summarise(
    found: torch.Tensor, found_converged: torch.Tensor, largest: Spectrum, a: float, n: int, method: str
) -> SpectrumFigures:
    there = ~found.isnan().all(0)  # of those that the work allowed no look at, nothing is said
    values, found_converged = found[:, there].numpy(), found_converged[:, there]
    outside = np.abs(values) > 1.0 + ROUNDING
    notes = []
    if method == "krylov" and values.size and bool(outside.all()):
        notes.append(f"all {values.shape[1]} eigenvalues computed lie outside the region: the share is a lower bound")
    converged = bool(found_converged.all() and largest.converged.all())
    if not converged:
        count = int((~found_converged).sum() + (~largest.converged).sum())
        notes.append(f"{count} of the spectral values computed have not converged")
    return SpectrumFigures(
        z=tuple(complex(v) - a for v in values[~np.isnan(values)]) if values.size else None,
        radius=float(np.nanmax(np.abs(values))) if values.size else None,
        norm=_maximum(largest.values),
        outside=float(outside.sum(axis=1).mean() / n) if values.size else None,
        method=method,
        converged=converged,
        notes=tuple(notes),
    )


def _maximum(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _first_samples(J: Jacobian, count: int) -> Jacobian:
    """The blocks of the first samples; products still pass the whole batch, with zeros for the others."""
    batch, m, n = J.shape
    if count >= batch:
        return J

    def padded(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def apply(block: torch.Tensor) -> torch.Tensor:
            whole = block.new_zeros(batch, *block.shape[1:])
            whole[:count] = block
            return product(whole)[:count]

        return apply

    return Jacobian((count, m, n), padded(J.matmat), padded(J.rmatmat), dtype=J.dtype, device=J.device, path=J.path)
