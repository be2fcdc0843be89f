"""All terms of one step, from its matrix where that is small and from probes where it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stabkit.attribution import after_addition, identity
from stabkit.attribution.field_spectra import field_jacobians
from stabkit.attribution.identity import Energies, half_log
from stabkit.attribution.mechanism import is_inverted
from stabkit.attribution.probes import Images, basis_images, random_images
from stabkit.attribution.step_mechanism import StepSpectrum
from stabkit.errors import TraceError
from stabkit.identification import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.jacobians import Jacobian, eigenvalues
from stabkit.jacobians.method_choice import krylov_products
from stabkit.jacobians.shared import SharedSpectra
from stabkit.statistics import student_factor
from stabkit.tracing import Step, same_space

_NEGLIGIBLE = 1e-6  # a slope this far below the largest switches its coordinate off
_TOLERANCE = 1e-3  # residual of a Krylov value, as a fraction of the norm of J


@dataclass(frozen=True)
class Budget:
    """What may be spent on a step.

    Attributes:
        dense_limit: largest state whose matrix and full spectrum are computed.
        probes: random cotangents for larger ones.
        krylov: outer eigenvalues for larger ones; 0 for none.
        confidence: the confidence level of the intervals.
        samples: how many samples, from the first.
        seed: the seed of the random choices.
    """

    dense_limit: int
    probes: int
    krylov: int
    confidence: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Terms:
    """The columns of `Attribution` for one step, ``(samples,)`` each, with what else later steps of the work need."""

    columns: dict[str, Tensor]
    spectral_interval: Tensor
    isotropic_interval: Tensor
    method: str
    values: Tensor | None
    mean: Tensor
    deviation: Tensor | None
    spectrum: StepSpectrum
    notes: tuple[str, ...]


def skip_of(found: Identification, tail: after_addition.Tail | None = None) -> float | None:
    """The coefficient a of a skip, before what follows the addition; 0 for a plain layer; None where none was read."""
    if found.skip is not None and math.isfinite(found.skip):
        return found.skip
    method = found.method
    if tail is None or len(tail.elements) != len(found.after) or not isinstance(method, GeneralLinearMethod):
        return None
    # a norm behind the addition: no single a describes the whole step, but one does what stands before the norm
    return float(method.V[0, 0]) if method.states == 1 and method.n_fields == 1 else None


def measure_step(
    step: Step,
    found: Identification,
    growths: Tensor,
    cotangents: Tensor | None,
    budget: Budget,
    spectra: SharedSpectra,
) -> Terms:
    """All terms of a step.

    Args:
        step: the step.
        found: its method.
        growths: ``(samples, k)``, measured, for each cotangent.
        cotangents: ``(samples, m, k)``, float64, what arrives at the target; None where the step is not small.
        budget: what may be spent.
        spectra: matrices and eigenvalues by index of the step.
    """
    growth = growths.mean(1)
    tail = after_addition.tail_of(step)
    m, n = step.target.size, step.source.size
    exact = max(m, n) <= budget.dense_limit
    if exact:
        images = basis_images(step, tail, spectra.matrix(step.index), budget.samples)
    else:
        images = random_images(step, tail, budget.samples, budget.probes, budget.seed)
    square = same_space(step.source, step.target)
    a = skip_of(found, tail) if square else None
    terms = _isotropic_terms(images, a, growth, square, m, budget)
    if not bool(images.pulled.isfinite().flatten(1).all(1).any()):
        why = "its Jacobian is not finite: nothing is attributed"
        return replace(terms, method="none", deviation=None, notes=(why,), spectrum=StepSpectrum(None, False, n))
    if exact and cotangents is not None:
        terms = _closed(terms, images, cotangents, growths)
        return (
            _with_spectrum(terms, images, step, found, tail, spectra)
            if square
            else _with_padding(terms, images, cotangents)
        )
    return _with_outer_values(terms, images, step, found, tail, budget) if square else terms


def _isotropic_terms(images: Images, a: float | None, growth: Tensor, square: bool, m: int, budget: Budget) -> Terms:
    """What needs no eigenvalues: the isotropic rate and its second split."""
    parts = identity.energies(images.pulled, images.tail, a or 0.0, exact=images.exact)
    isotropic = isotropic_bracket(parts, m, student_factor(budget.probes, budget.confidence) if not images.exact else 0)
    nan = torch.full_like(growth, math.nan)
    skip, dissipation, branch = (nan, nan, nan) if a is None else identity.in_nats(parts, a)
    dead = torch.isneginf(isotropic.value)
    columns = {
        "growth": growth,
        "spectral": nan,
        "non_normal": nan,
        "alignment": torch.where(dead & torch.isneginf(growth), torch.zeros_like(growth), growth - isotropic.value),
        "transition": torch.zeros_like(growth) if square else isotropic.value,
        "isotropic": isotropic.value,
        **images.tail_rates(m),
        "skip": skip,
        "dissipation": dissipation,
        "branch": branch,
        "frozen": nan,
        "volume": nan,
        "closing_error": nan,
    }
    vectors = _cotangents_again(images, budget) if square else None
    return Terms(
        columns=columns,
        spectral_interval=torch.stack([nan, nan], 1),
        isotropic_interval=isotropic.interval,
        method="dense" if images.exact else "estimated",
        values=None,
        mean=nan if vectors is None else images.mean(vectors),
        deviation=None if vectors is None else images.deviation(vectors),
        spectrum=StepSpectrum(None, False, m),
        notes=(),
    )


def _closed(terms: Terms, images: Images, cotangents: Tensor, growths: Tensor) -> Terms:
    """Hold |J^T g| from the matrix against the growth that was measured from the chain, the mean over cotangents."""
    size = torch.linalg.vector_norm(cotangents, dim=1, keepdim=True)
    units = cotangents / torch.where(size > 0, size, torch.ones_like(size))
    pulled = torch.linalg.vector_norm(images.pulled @ units, dim=1)
    same = torch.isneginf(growths) & (pulled == 0)
    errors = torch.where(same, torch.zeros_like(growths), pulled.log() - growths)
    return replace(terms, columns={**terms.columns, "closing_error": errors.mean(1)})


def _with_spectrum(
    terms: Terms,
    images: Images,
    step: Step,
    found: Identification,
    tail: after_addition.Tail | None,
    spectra: SharedSpectra,
) -> Terms:
    values = torch.full(images.J.shape[:2], complex(math.nan, math.nan), dtype=torch.complex128)
    for sample in images.J.isfinite().flatten(1).all(1).nonzero().flatten().tolist():
        values[sample] = spectra.eigenvalues(step.index, sample).values[0]
    spectral, non_normal = identity.spectral_terms(terms.columns["isotropic"], values)
    columns = {
        **terms.columns,
        "spectral": spectral,
        "non_normal": non_normal,
        "frozen": values.abs().amax(1).log(),
        "volume": values.abs().log().mean(1),
    }
    return replace(
        terms,
        columns=columns,
        spectral_interval=torch.stack([spectral, spectral], 1),
        values=values,
        spectrum=_with_fields(_before_tail(images, values, step, found, tail), step, found),
    )


def _with_fields(spectrum: StepSpectrum, step: Step, found: Identification) -> StepSpectrum:
    """The Jacobians of the fields beside it, where one eigenvalue of the step does not tell z."""
    method = found.method
    if not isinstance(method, GeneralLinearMethod) or method.stages == 0 or is_inverted(method) or spectrum.J is None:
        return spectrum
    return replace(spectrum, fields=field_jacobians(step, found, len(spectrum.J), spectrum.J))


def _all_eigenvalues(J: Tensor) -> Tensor:
    """``(samples, d)``; NaN for samples whose matrix is not finite."""
    finite = J.isfinite().flatten(1).all(1)
    values = torch.full(J.shape[:2], complex(math.nan, math.nan), dtype=torch.complex128)
    values[finite] = eigenvalues(J[finite].contiguous(), method="dense").values
    return values


def _before_tail(
    images: Images, values: Tensor, step: Step, found: Identification, tail: after_addition.Tail | None
) -> StepSpectrum:
    """The spectrum that the method is about: that of a I + B, where a mask or a norm follows the addition."""
    n, J = images.pulled.shape[1], images.J
    if tail is None or not found.after or skip_of(found, tail) in (None, 0.0):
        return StepSpectrum(values.numpy(), True, n, J=J.numpy())
    if not tail.is_diagonal:
        K = after_addition.body(tail, step).backward(
            torch.eye(n, dtype=step.target.space.dtype, device=step.target.space.device).expand(
                step.target.space.batch, n, n
            )
        )
        K = K[: len(J)].detach().to(device="cpu", dtype=torch.float64).transpose(1, 2).contiguous()
        return StepSpectrum(_all_eigenvalues(K).numpy(), True, n, J=K.numpy(), notes=("before the norm",))
    slopes = images.tail.diagonal(dim1=1, dim2=2)
    found_values, masked = np.full((len(J), n), complex(math.nan, math.nan)), 0
    for sample, (matrix, slope) in enumerate(zip(J, slopes, strict=True)):
        active = slope.abs() > _NEGLIGIBLE * slope.abs().max()
        masked += n - int(active.sum())
        if not bool(active.any()) or not bool(matrix.isfinite().all()):
            continue
        K = matrix[active][:, active] / slope[active].unsqueeze(1)
        found_values[sample, : K.shape[0]] = eigenvalues(K, method="dense").values[0].numpy()
    note = "the active coordinates, before the activation"
    return StepSpectrum(found_values, True, n, masked=masked / (len(J) * n), notes=(note,))


def _with_padding(terms: Terms, images: Images, cotangents: Tensor) -> Terms:
    """Read a concatenation in the padded space, where it has the spectrum of the identity."""
    found = identity.padded(images.J, cotangents)
    if found is None:
        return terms
    zero = torch.zeros_like(found.isotropic)
    growth = terms.columns["growth"]
    columns = {
        **terms.columns,
        "spectral": zero,
        "non_normal": found.isotropic,
        "transition": found.lost,
        "alignment": growth - found.isotropic - found.lost,
        "isotropic": found.isotropic,
        "frozen": zero,
        "volume": zero,
    }
    interval = torch.stack([zero, zero], 1)
    rates = torch.stack([found.isotropic, found.isotropic], 1)
    note = "appends to its source: read in the padded space, where every eigenvalue is 1"
    return replace(terms, columns=columns, spectral_interval=interval, isotropic_interval=rates, notes=(note,))


def _with_outer_values(
    terms: Terms, images: Images, step: Step, found: Identification, tail: after_addition.Tail | None, budget: Budget
) -> Terms:
    """The spectral term as a bracket, from first-order traces and the outer eigenvalues."""
    outer: Tensor | None = None
    notes: tuple[str, ...] = ()
    if budget.krylov:
        outer, note = outer_eigenvalues(step.jacobian(), budget.krylov, budget.seed)
        outer = None if outer is None else outer[: budget.samples]
        notes = (note,) if note else ()
    a = skip_of(found, tail) or 0.0
    whole = images if tail is None else replace(images, tail=_cotangents_again(images, budget))
    parts = identity.energies(whole.pulled, whole.tail, a, exact=False)
    reach = student_factor(budget.probes, budget.confidence)
    bracket = spectral_bracket(parts, a, images.pulled.shape[1], outer, reach)
    isotropic = terms.columns["isotropic"]
    spectral = torch.minimum(bracket.value, isotropic)
    frozen = terms.columns["frozen"] if outer is None else _largest(outer)
    readable = outer is not None and (tail is None or not found.after)
    return replace(
        terms,
        columns={**terms.columns, "spectral": spectral, "non_normal": isotropic - spectral, "frozen": frozen},
        spectral_interval=bracket.interval,
        values=outer,
        spectrum=StepSpectrum(outer.numpy() if outer is not None and readable else None, False, images.pulled.shape[1]),
        notes=(*notes, "spectral term between the bounds of Cauchy-Schwarz and Schur, not computed"),
    )


def _cotangents_again(images: Images, budget: Budget) -> Tensor:
    """The test cotangents of a step that keeps its space, before the tail: a basis, or the signs that were drawn."""
    samples, n, k = images.pulled.shape
    if images.exact:
        return torch.eye(n, dtype=torch.float64).expand(samples, -1, -1)
    generator = torch.Generator().manual_seed(budget.seed)
    signs = torch.randint(0, 2, (n, k), generator=generator) * 2 - 1
    return signs.to(torch.float64).expand(samples, -1, -1)


def _largest(outer: Tensor) -> Tensor:
    """Log of the largest modulus that converged, ``(samples,)``."""
    modulus = outer.abs()
    finite = torch.where(modulus.isfinite(), modulus, torch.zeros_like(modulus)).amax(1)
    return torch.where(finite > 0, finite.log(), torch.full_like(finite, math.nan))


@dataclass(frozen=True)
class Bracket:
    """A term with its interval.

    Attributes:
        value: ``(samples,)``, nats.
        interval: ``(samples, 2)``.
    """

    value: Tensor
    interval: Tensor


def isotropic_bracket(parts: Energies, size: int, reach: float) -> Bracket:
    """1/2 log(|J|_F^2 / size) with the interval that the probes leave it."""
    low = (parts.total - reach * parts.total_error).clamp_min(0.0)
    ends = torch.stack([half_log(low, size), half_log(parts.total + reach * parts.total_error, size)], 1)
    return Bracket(half_log(parts.total, size), ends)


def spectral_bracket(parts: Energies, a: float, size: int, outer: Tensor | None, reach: float) -> Bracket:
    """1/2 log(sum |lambda|^2 / size) between what must be in the spectrum and what can be.

    With J = a I + B and beta the eigenvalues of B: sum |lambda|^2 = a^2 d + 2 a tr B + sum |beta|^2, and sum |beta|^2
    lies between the larger of (tr B)^2 / d (Cauchy and Schwarz) and the sum over the eigenvalues that were found, and
    |B|_F^2 (Schur). The value takes the middle of the two; the interval is the bracket, widened by the spread of the
    probes.

    Args:
        parts: energies of the step, the tail counted to the branch.
        a: the skip.
        size: d.
        outer: ``(samples, k)``, eigenvalues found by a Krylov method, NaN where not converged; None for none.
        reach: standard errors to each side.
    """
    first = parts.dissipation / (2 * a) if a else torch.zeros_like(parts.total)
    least = first.square() / size
    if outer is not None:
        found = (outer - a).abs().square()
        least = torch.maximum(least, torch.where(found.isfinite(), found, torch.zeros_like(found)).sum(1))
    least = torch.minimum(least, parts.branch)
    base = parts.skip + parts.dissipation
    middle = base + (least + parts.branch) / 2
    low = (base + least - reach * parts.dissipation_error).clamp_min(0.0)
    high = parts.total + reach * parts.total_error
    value = half_log(torch.minimum(middle.clamp_min(0.0), parts.total), size)
    return Bracket(value, torch.stack([half_log(low, size), half_log(high, size)], 1))


def outer_eigenvalues(J: Jacobian, count: int, seed: int) -> tuple[Tensor | None, str]:
    """The eigenvalues of largest modulus, ``(batch, count)``, NaN where not converged; or None and the reason why."""
    wanted = min(count, J.shape[1])
    try:
        found = eigenvalues(
            J,
            wanted,
            tol=_TOLERANCE,
            seed=seed,
            method="krylov-schur",
            max_products=krylov_products(J.shape[1]),
            two_sided=False,
        )
    except (ValueError, ArithmeticError, TraceError) as error:
        # products that are not finite, or a forward product without a certificate: a fact about the step
        return None, f"no eigenvalues: {str(error).splitlines()[0]}"
    missing = int((~found.converged).sum())
    note = f"{missing} of {found.converged.numel()} outer eigenvalues did not converge" if missing else ""
    nan = torch.full_like(found.values, complex(math.nan, math.nan))
    return torch.where(found.converged, found.values, nan), note
