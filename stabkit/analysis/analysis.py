"""`analyze`: one call that traces a model, measures every step and says what it means."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import nn

from stabkit._version import __version__
from stabkit.analysis.explanation import Explanation, explain
from stabkit.analysis.spectra import SPECTRA, StepSpectrum, step_spectrum
from stabkit.diagnosis import Measurement, Thresholds, bootstrap_interval, examine
from stabkit.distributed import Ranks, current, fingerprint, is_spread, is_tensor_parallel, whole_parameters
from stabkit.errors import StabkitError, TraceError
from stabkit.growth import lyapunov_spectrum
from stabkit.identification import Identification, by_step, identify
from stabkit.integrators import GeneralLinearMethod
from stabkit.parallel import SERIAL, Parallel
from stabkit.report.schema import Exponents, Report, StepReport
from stabkit.tracing import Flow, Step, trace
from stabkit.tracing.depth import Depth
from stabkit.tracing.endpoints import Target
from stabkit.tracing.safekeeping import modules_behind, unchanged, unwrap

if TYPE_CHECKING:
    from stabkit.planning import Plan

EXPLAINED = 4  # samples over which growth is attributed
_EXPONENTS = 4  # Lyapunov exponents of the whole flow
_EXPONENTS_COST = 0.05  # of them, over that of all spectra

Progress = Callable[[int, int, str], None]


@overload
def analyze(model: Any, *inputs: Any, plan_only: Literal[True], **options: Any) -> Plan: ...


@overload
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
    distributed: bool = True,
    ranks: Ranks | None = None,
    budget: str | float | None = None,
    memory: str | float | None = None,
    plan_only: Literal[False] = False,
) -> Report: ...


def analyze(  # type: ignore[misc]  # where only the plan is wanted, the options are those of the other overload
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
    distributed: bool = True,
    ranks: Ranks | None = None,
    budget: str | float | None = None,
    memory: str | float | None = None,
    plan_only: bool = False,
) -> Report | Plan:
    """Trace a model and report, step by step, its integrator, its spectrum and its gradient growth, with a verdict.

    The model, its gradients and the random state come back as they were, also after an error.

    A lesson with a picture: ``examples/residual_and_plain.py``.

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
        distributed: where a process group runs (``torchrun``), share the work with its other ranks. Every rank must
            then make this call, with the same model and input, and gets the same report. False analyses on this rank
            alone; a model whose parameters are spread over the ranks cannot be.
        ranks: who shares the work; by default all ranks of the process group that runs.
        budget: time that the analysis may take, in seconds or as ``"10m"``. Samples, probes and spectra are left out
            to keep it, and the notes of the report say which.
        memory: bytes that the process may use, or ``"8G"``; likewise.
        plan_only: analyse nothing but return what it would cost, a `stabkit.planning.Plan`, whose ``str`` is a table.

    Raises:
        StabkitError: not even the least analysis keeps the budget.
        TraceError: the model could not be traced, or an argument makes no sense for it.
        RankError: the ranks were called with different models or inputs, or one of them failed or is gone.

    Example:
        >>> import torch
        >>> layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(20)]
        >>> for layer in layers: _ = torch.nn.init.orthogonal_(layer.weight, gain=0.5)
        >>> report = analyze(torch.nn.Sequential(*layers), torch.ones(4, 8))
        >>> report.verdict, round(report.total_growth, 3), round(20 * math.log(0.5), 3)
        ('vanishing', -13.863, -13.863)
        >>> analyze(torch.nn.Sequential(*layers), torch.ones(4, 8), plan_only=True).steps
        20
    """
    if spectrum not in SPECTRA:
        raise TraceError(f"spectrum={spectrum!r}; expected one of {', '.join(SPECTRA)}")
    if probes < 1 or spectrum_samples < 1:
        raise TraceError(f"probes={probes}, spectrum_samples={spectrum_samples}; both must be at least 1")
    began = time.perf_counter()
    limits = thresholds or Thresholds()
    model = unwrap(model)
    group = _group(model, inputs, kwargs, distributed, ranks)
    given_up: tuple[str, ...] = ()
    if plan_only or budget is not None or memory is not None:
        options = {
            "depth": depth, "source": source, "target": target, "spectrum": spectrum,
            "spectrum_samples": spectrum_samples, "probes": probes, "seed": seed, "budget": budget, "memory": memory,
        }  # fmt: skip
        plan = _planned(group, model, inputs, kwargs, loss, batch_dim, options)
        if plan_only:
            return plan
        _refuse_unaffordable(plan, budget, memory)
        inputs, kwargs = plan.call(*inputs, kwargs=kwargs, batch_dim=batch_dim)
        chosen = plan.settings
        probes, spectrum, spectrum_samples = chosen.probes, chosen.spectrum, chosen.spectrum_samples
        given_up = tuple(f"left out to keep the budget: {words}" for words in plan.given_up)
    # products of tensor-parallel models are collective: all ranks do all of them together
    parallel: Parallel = SERIAL if is_tensor_parallel(model) else group
    # the whole analysis, not only the forward pass, must leave the model as it was
    with whole_parameters(model), unchanged(modules_behind(model)):
        flow = trace(
            model, *inputs, kwargs=kwargs, depth=depth, batch_dim=batch_dim, source=source, target=target, seed=seed
        )
        found = identify(flow, parallel=parallel)
        methods = by_step(found, len(flow.steps))
        diagnosis = examine(flow, loss, thresholds=limits, probes=probes, seed=seed, methods=found, parallel=parallel)

        def spectrum_of(index: int) -> StepSpectrum:
            step = flow.steps[index]
            measured = step_spectrum(step, methods[index], spectrum, spectrum_samples, seed)
            step.segment.release()
            if progress is not None:
                progress(step.index + 1, len(flow.steps), step.name)
            return measured

        # the cost of a step's products; what a spectrum gives does not depend on who computes it
        costs = [float(max(step.source.size, step.target.size)) for step in flow.steps]
        pieces: list[Callable[[], Any]] = [functools.partial(spectrum_of, index) for index in range(len(costs))]
        if spectrum != "none":
            pieces.append(functools.partial(_lyapunov, flow, seed))
            costs.append(_EXPONENTS_COST * sum(costs))
        spectra = parallel.share(lambda piece: pieces[piece](), costs, name="step")
        why, exponents = Explanation(), None
        missing: tuple[str, ...] = ()
        if spectrum != "none":
            exponents, missing = spectra[-1]
            samples = min(flow.batch, max(spectrum_samples, EXPLAINED))
            why = explain(flow, diagnosis, found, samples, seed, limits, parallel)
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
        lyapunov=exponents,
        **{
            f"output_{name}": value
            for name, value in _norms(measurement, -1, flow.states[-1].size, limits, seed).items()
        },
        notes=(
            *given_up,
            *flow.notes,
            *why.notes,
            *missing,
            *_restart_notes(flow, measurement),
            *_side_input_notes(flow),
        ),
        versions={"stabkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def _group(
    model: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None, distributed: bool, ranks: Ranks | None
) -> Ranks:
    """Who takes part; they have all been called with the same."""
    if not distributed:
        if is_spread(model):
            raise TraceError(
                "distributed=False for a model whose parameters are spread over the ranks; leave it out, and make the "
                "call on every rank"
            )
        return Ranks()
    ranks = current() if ranks is None else ranks
    ranks.meet("stabkit.analyze", lambda: fingerprint(model, inputs, kwargs or {}))
    return ranks


def _planned(
    group: Ranks,
    model: Any,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    loss: Any,
    batch_dim: int | None,
    options: Mapping[str, Any],
) -> Plan:
    """What the analysis will cost in one process; the first rank measures it for all."""
    from stabkit.planning import plan

    def foretell() -> Plan | None:
        if not (group.first or is_tensor_parallel(model)):
            return None
        return plan(model, *inputs, loss=loss, kwargs=kwargs, batch_dim=batch_dim, **options)

    with whole_parameters(model):
        found = group.together(foretell)
    agreed: Plan = group.gather(found)[0]
    return agreed


def _refuse_unaffordable(plan: Plan, budget: str | float | None, memory: str | float | None) -> None:
    if plan.fits:
        return
    limits = [f"{name}={given}" for name, given in (("budget", budget), ("memory", memory)) if given is not None]
    raise StabkitError(f"no analysis of this model keeps {' and '.join(limits)}; the least that one takes:\n{plan}")


def _lyapunov(flow: Flow, seed: int) -> tuple[Exponents | None, tuple[str, ...]]:
    """The largest exponents of the first sample, or why there are none."""
    count = min(_EXPONENTS, *(state.size for state in flow.states))
    if count < 1 or not flow.steps:
        return None, ()
    try:
        found = lyapunov_spectrum(flow, count, seed=seed)
    except (TraceError, ArithmeticError) as error:
        return None, (f"no Lyapunov exponents: {str(error).splitlines()[0]}",)
    if not bool(found.exponents[0].isfinite().any()):
        return None, ("no Lyapunov exponents: a step passes nothing on, as a head initialised at zero does",)
    first = {name: getattr(found, name)[:1].tolist() for name in ("exponents", "standard_errors", "converged")}
    rows = {name: tuple(map(tuple, values)) for name, values in first.items()}
    growth = tuple((tuple(row),) for row in found.local_growth[:, 0].tolist())
    return Exponents(**rows, local_growth=growth), ()


def _step_report(
    step: Step,
    method: Identification,
    spectrum: StepSpectrum,
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
        **_tableau(method),
        z=spectrum.z,
        numerical_range=spectrum.numerical_range,
        spectral_radius=spectrum.radius,
        largest_singular_value=spectrum.norm,
        outside_share=spectrum.outside,
        spectrum_method=spectrum.method,
        spectrum_converged=spectrum.converged,
        growth=mean,
        growth_interval=bootstrap_interval(growth, limits, seed) if finite else (mean, mean),
        **_norms(measurement, step.index, step.source.size, limits, seed),
        notes=(*step.notes, *method.notes, *spectrum.notes),
    )


def _norms(measurement: Measurement, index: int, size: int, limits: Thresholds, seed: int) -> dict[str, Any]:
    """Geometric means over samples of the norms of one state and of its gradient, with their intervals."""
    logs = {
        "gradient_norm": measurement.log_gradients[index],
        "state_norm": measurement.log_states[index] + 0.5 * math.log(max(size, 1)),
    }
    found: dict[str, Any] = {}
    with np.errstate(over="ignore"):
        for name, row in logs.items():
            mean = float(row.mean())
            ends = bootstrap_interval(row, limits, seed) if np.isfinite(row).all() else (mean, mean)
            found[name] = float(np.exp(mean))
            found[f"{name}_interval"] = (float(np.exp(ends[0])), float(np.exp(ends[1])))
    return found


def _tableau(found: Identification) -> dict[str, Any]:
    """The blocks of a method and the field of each stage; those of several steps together are not those of each."""
    if len(found.steps) != 1 or not isinstance(found.method, GeneralLinearMethod):
        return {}
    blocks = {name: tuple(map(tuple, getattr(found.method, name).tolist())) for name in "AUBV"}
    return {"tableau": blocks, "stage_fields": found.method.fields}


def _restart_notes(flow: Flow, measurement: Measurement) -> tuple[str, ...]:
    return tuple(
        f"gradient norms before {flow.steps[index].name} are those of a fresh random cotangent"
        for index in measurement.restarts
    )


def _side_input_notes(flow: Flow) -> tuple[str, ...]:
    if not flow.side_inputs:
        return ()
    return (f"depth is counted from {flow.source_name}; held fixed: {', '.join(flow.side_inputs)}",)
