"""`analyze`: one call that traces a model, measures every step and says what it means."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stabkit._version import __version__
from stabkit.diagnosis import Array, Measurement, Thresholds, bootstrap_interval, examine
from stabkit.errors import TraceError
from stabkit.explanation import Explanation, explain
from stabkit.identification import Identification, by_step, identify
from stabkit.jacobians import Jacobian, Spectrum, eigenvalues, from_dense, singular_values
from stabkit.report.schema import Report, StepReport
from stabkit.tracing import Flow, Step, trace
from stabkit.tracing.depth import Depth
from stabkit.tracing.endpoints import Target
from stabkit.tracing.safekeeping import modules_behind, unchanged, unwrap

SPECTRA = ("auto", "dense", "krylov", "none")
_DENSE_SIZE = 512  # up to here all eigenvalues are cheaper than a dozen by Krylov, and say more
_LARGEST_DENSE = 8192  # beyond, a matrix and its factors no longer fit beside a model, and take hours
_EXPLAINED = 4  # samples over which growth is attributed
_WANTED = 6  # eigenvalues and singular values of larger steps
_TOLERANCE = 1e-3  # residual of a Krylov value, as a fraction of the norm of J
_WORK = 5_000_000  # numbers that all products of one Krylov spectrum may pass, a bound on its time
_ROUNDING = 1e-4  # how far |a + z| may exceed 1 by rounding before an eigenvalue counts as outside

Progress = Callable[[int, int, str], None]
Share = Callable[[Callable[[int], Any], Sequence[float]], list[Any]]


def analyze(
    model: Any,
    *inputs: Any,
    loss: Callable[[Any], torch.Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    depth: Depth = "auto",
    batch_dim: int | None = 0,
    source: str | None = None,
    target: Target = None,
    spectrum: str = "auto",
    spectrum_samples: int = 1,
    probes: int = 4,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
    share: Share | None = None,
) -> Report:
    """Trace a model and report, step by step, its integrator, its spectrum and its gradient growth, with a verdict.

    The model, its gradients and the random state come back as they were, also after an error.

    Args:
        model: a ``torch.nn.Module`` or a function of tensors.
        *inputs: what it is called with; more samples make the verdict surer.
        loss: a callable on the model's output that returns a scalar. None pulls back ``probes`` random cotangents.
        kwargs: keyword arguments of the call.
        depth: where steps end, see `stabkit.trace`.
        batch_dim: which dimension counts samples; None makes the whole batch one state.
        source: the input to start from, when there are several.
        target: the output to end at, see `stabkit.trace`.
        spectrum: ``"dense"`` (every eigenvalue, of states of up to 8192 numbers), ``"krylov"`` (the largest few),
            ``"none"``, or ``"auto"`` (dense up to 512 numbers, Krylov beyond).
        spectrum_samples: how many samples' spectra are computed.
        probes: random cotangents per sample when there is no loss.
        thresholds: the limits behind the verdict.
        seed: of every random choice.
        name: what the report calls the model; its class by default.
        progress: called with (done, total, step name) as steps are finished.
        share: does the spectra of steps in another way than one after the other: called with a function of a step's
            index and the costs of all, it returns all results in order; see `stabkit.distributed`.

    Raises:
        TraceError: the model could not be traced, or an argument makes no sense for it.

    Example:
        >>> import torch
        >>> layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(20)]
        >>> for layer in layers: _ = torch.nn.init.orthogonal_(layer.weight, gain=0.5)
        >>> report = analyze(torch.nn.Sequential(*layers), torch.ones(4, 8))
        >>> report.verdict, round(report.total_growth, 3), round(20 * math.log(0.5), 3)
        ('vanishing', -13.863, -13.863)
    """
    if spectrum not in SPECTRA:
        raise TraceError(f"spectrum={spectrum!r}; expected one of {', '.join(SPECTRA)}")
    if probes < 1 or spectrum_samples < 1:
        raise TraceError(f"probes={probes}, spectrum_samples={spectrum_samples}; both must be at least 1")
    began = time.perf_counter()
    limits = thresholds or Thresholds()
    model = unwrap(model)
    # the whole analysis, not only the forward pass, must leave the model as it was
    with unchanged(modules_behind(model)):
        flow = trace(
            model, *inputs, kwargs=kwargs, depth=depth, batch_dim=batch_dim, source=source, target=target, seed=seed
        )
        found = identify(flow)
        methods = by_step(found, len(flow.steps))
        diagnosis = examine(flow, loss, thresholds=limits, probes=probes, seed=seed, methods=found)

        def spectrum_of(index: int) -> _StepSpectrum:
            step = flow.steps[index]
            measured = _step_spectrum(step, methods[index], spectrum, spectrum_samples, seed)
            step.segment.release()
            if progress is not None:
                progress(step.index + 1, len(flow.steps), step.name)
            return measured

        # the cost of a step's products; what a spectrum gives does not depend on who computes it
        costs = [float(max(step.source.size, step.target.size)) for step in flow.steps]
        spectra = [spectrum_of(index) for index in range(len(costs))] if share is None else share(spectrum_of, costs)
        why = Explanation()
        if spectrum != "none":
            why = explain(flow, diagnosis, found, min(flow.batch, max(spectrum_samples, _EXPLAINED)), seed)
    verdict, measurement = diagnosis.verdict, diagnosis.measurement
    return Report(
        model=name or type(flow.model if isinstance(model, nn.Module) else model).__name__,
        verdict=verdict.name,
        summary=verdict.summary,
        findings=diagnosis.findings,
        steps=tuple(
            why.completed(_step_report(step, methods[i], spectra[i], measurement, limits, seed))
            for i, step in enumerate(flow.steps)
        ),
        total_growth=verdict.growth,
        total_growth_interval=verdict.interval,
        chain_error=math.nan if flow.chain_error is None else flow.chain_error,
        n_parameters=sum(p.numel() for p in flow.model.parameters()),
        dtype=str(flow.states[0].space.dtype).removeprefix("torch."),
        device=str(flow.states[0].space.device),
        mode="train" if flow.model.training else "eval",
        loss=measurement.loss,
        seed=seed,
        seconds=time.perf_counter() - began,
        thresholds=limits.to_dict(),
        explained=why.explained,
        rate_law=why.rate_law,
        notes=(*flow.notes, *why.notes, *_restart_notes(flow, measurement), *_side_input_notes(flow)),
        versions={"stabkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )


@dataclass(frozen=True)
class _StepSpectrum:
    """What the spectrum of one step's Jacobian says; None where it was not computed."""

    z: tuple[complex, ...] | None = None
    radius: float | None = None
    norm: float | None = None
    outside: float | None = None
    method: str = "none"
    converged: bool = False
    notes: tuple[str, ...] = ()


def _step_spectrum(step: Step, method: Identification, mode: str, samples: int, seed: int) -> _StepSpectrum:
    if mode == "none":
        return _StepSpectrum()
    J: Jacobian = _first_samples(step.jacobian(), samples)
    _, m, n = J.shape
    dense = mode == "dense" or (mode == "auto" and max(m, n) <= _DENSE_SIZE)
    try:
        if dense and max(m, n) > _LARGEST_DENSE:
            raise ValueError(
                f"a dense spectrum of {max(m, n)} numbers is too large (at most {_LARGEST_DENSE}): use krylov"
            )
        if dense:
            J = from_dense(J.dense())  # once, for both spectra
        largest = _largest_singular_value(J, dense, seed)
        if m != n or step.source.sample_shapes != step.target.sample_shapes:
            norm, converged = _maximum(largest.values), bool(largest.converged.all())
            return _StepSpectrum(norm=norm, method="dense" if dense else "krylov", converged=converged)
        found = _eigenvalues(J, dense, seed)
    except (ValueError, ArithmeticError, TraceError) as error:
        # non-finite weights or an operation without a certified product: a fact about the step, not a failure
        return _StepSpectrum(notes=(f"no spectrum: {str(error).splitlines()[0]}",))
    return _summarise(found, largest, method, n, dense)


def _summarise(found: Spectrum, largest: Spectrum, method: Identification, n: int, dense: bool) -> _StepSpectrum:
    values = found.values.numpy()
    a = 0.0 if method.skip is None else method.skip
    outside = np.abs(values) > 1.0 + _ROUNDING
    notes = []
    if not dense and bool(outside.all()):
        notes.append(f"all {values.shape[1]} eigenvalues computed lie outside the region: the share is a lower bound")
    converged = bool(found.converged.all() and largest.converged.all())
    if not converged:
        count = int((~found.converged).sum() + (~largest.converged).sum())
        notes.append(f"{count} of the spectral values computed have not converged")
    return _StepSpectrum(
        z=tuple(complex(v) - a for v in values.reshape(-1)),
        radius=float(np.abs(values).max()),
        norm=_maximum(largest.values),
        outside=float(outside.sum(axis=1).mean() / n),
        method="dense" if dense else "krylov",
        converged=converged,
        notes=tuple(notes),
    )


def _largest_singular_value(J: Jacobian, dense: bool, seed: int) -> Spectrum:
    if dense:
        return singular_values(J, seed=seed, method="dense")
    return singular_values(J, 1, tol=_TOLERANCE, seed=seed, method="golub-kahan", max_products=_products(J))


def _eigenvalues(J: Jacobian, dense: bool, seed: int) -> Spectrum:
    if dense:
        return eigenvalues(J, seed=seed, method="dense")
    wanted = min(_WANTED, J.shape[1])
    return eigenvalues(
        J, wanted, tol=_TOLERANCE, seed=seed, method="krylov-schur", max_products=_products(J), two_sided=False
    )


def _products(J: Jacobian) -> int:
    """How many products a Krylov spectrum may spend: fewer on larger steps, where each costs more."""
    return min(400, max(60, _WORK // max(J.shape[1:])))


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


def _step_report(
    step: Step,
    method: Identification,
    spectrum: _StepSpectrum,
    measurement: Measurement,
    limits: Thresholds,
    seed: int,
) -> StepReport:
    growth = measurement.growth[step.index]
    finite = bool(np.isfinite(growth).all())
    mean = float(growth.mean())
    return StepReport(
        index=step.index,
        name=step.name,
        module_path=step.module_path,
        kind=step.kind,
        source_shapes=step.source.sample_shapes,
        target_shapes=step.target.sample_shapes,
        source_size=step.source.size,
        target_size=step.target.size,
        method=method.name,
        skip=method.skip,
        evidence=method.evidence,
        residual=method.residual,
        step_size=method.step_size,
        convention=method.convention if method.step_size is not None else "",
        after=method.after,
        operations=step.operations,
        z=spectrum.z,
        spectral_radius=spectrum.radius,
        largest_singular_value=spectrum.norm,
        outside_share=spectrum.outside,
        spectrum_method=spectrum.method,
        spectrum_converged=spectrum.converged,
        growth=mean,
        growth_interval=bootstrap_interval(growth, limits, seed) if finite else (mean, mean),
        gradient_norm=_geometric_mean(measurement.log_gradients[step.index]),
        state_norm=_geometric_mean(measurement.log_states[step.index] + 0.5 * math.log(max(step.source.size, 1))),
        notes=(*step.notes, *method.notes, *spectrum.notes),
    )


def _geometric_mean(logs: Array) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(logs.mean()))


def _restart_notes(flow: Flow, measurement: Measurement) -> tuple[str, ...]:
    return tuple(
        f"gradient norms before {flow.steps[index].name} are those of a fresh random cotangent"
        for index in measurement.restarts
    )


def _side_input_notes(flow: Flow) -> tuple[str, ...]:
    if not flow.side_inputs:
        return ()
    return (f"depth is counted from {flow.source_name}; held fixed: {', '.join(flow.side_inputs)}",)
