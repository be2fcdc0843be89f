"""`analyze`: one call that traces a model, measures every step and says what it means."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import nn

from stabkit._version import __version__
from stabkit.analysis.explanation import Explanation, explain
from stabkit.analysis.first_samples import of_first_samples
from stabkit.analysis.progress import Listener, Progress, Told
from stabkit.analysis.records import lyapunov, norms, restart_notes, side_input_notes, step_report, untried_notes
from stabkit.analysis.settings import Settings, affordable, planned
from stabkit.analysis.spectra import StepSpectra, by_importance, plan_spectra
from stabkit.analysis.updates import check_optimizer, with_updates
from stabkit.arguments import accepts
from stabkit.attribution.measure import EXPLAINED
from stabkit.diagnosis import Diagnosis, Thresholds, examine
from stabkit.diagnosis.no_gradient.unreached import findings_without_flow
from stabkit.diagnosis.non_finite.findings import is_finite
from stabkit.diagnosis.states.batch_statistics import with_statistics
from stabkit.diagnosis.verdict import led_by_findings
from stabkit.distributed import Ranks, current, fingerprint, is_spread, is_tensor_parallel, whole_parameters
from stabkit.errors import TraceError
from stabkit.identification import Identification, by_step, identify, unidentified
from stabkit.jacobians.shared import SharedSpectra
from stabkit.parallel import SERIAL, Parallel
from stabkit.planning import SPECTRA, Plan
from stabkit.report import Exponents, Report, StepReport, TrainingReport
from stabkit.threads import torch_threads
from stabkit.tracing import Flow, trace
from stabkit.tracing.cutting.boundaries import Depth
from stabkit.tracing.cutting.endpoints import Target, UnreachedError
from stabkit.tracing.recording.batch_parts import Call
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.untouched_model import unchanged
from stabkit.tracing.recording.wrappers import modules_behind, unwrap


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
    progress: Progress | Listener | None = None,
    distributed: bool = True,
    ranks: Ranks | None = None,
    budget: str | float | None = None,
    memory: str | float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    trained: bool = False,
    plan_only: Literal[False] = False,
) -> Report: ...


@accepts  # type: ignore[misc]  # where only the plan is wanted, the options are those of the other overload
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
    progress: Progress | Listener | None = None,
    distributed: bool = True,
    ranks: Ranks | None = None,
    budget: str | float | None = None,
    memory: str | float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    trained: bool = False,
    plan_only: bool = False,
) -> Report | Plan:
    """Trace a model and report, step by step, its integrator, its spectrum and its gradient growth, with a verdict.

    The model, its gradients and the random state come back as they were, also after an error.

    A lesson with a picture: ``examples/residual_and_plain.py``.

    Args:
        model: a ``torch.nn.Module`` or a function of tensors.
        *inputs: what it is called with; more samples make the verdict surer.
        loss: a callable on the model's output that returns a scalar. None pulls back ``probes`` random cotangents.
            Where it reads several outputs, depth leads to all of them as one state, and a note says so.
        kwargs: keyword arguments of the call.
        depth: where steps end, see `stabkit.trace`.
        batch_dim: which dimension counts samples; None makes the whole batch one state.
        source: the input to start from, when there are several.
        target: the output to end at, see `stabkit.trace`.
        spectrum: ``"dense"`` (every eigenvalue, of states of up to 8192 numbers), ``"krylov"`` (the largest few),
            ``"full"`` (dense up to 512 numbers, Krylov beyond), ``"none"``, or ``"auto"``: as ``"full"``, within the
            work of about 25 training steps. Steps at fault and those of most growth come first, and a note says what
            was left out. Work is counted, not timed: the same call gives the same numbers.
        spectrum_samples: how many samples' spectra are computed.
        probes: random cotangents per sample when there is no loss.
        thresholds: the limits behind the verdict.
        seed: the seed of every random choice.
        name: what the report calls the model; its class by default.
        progress: called with (done, total, step name) as steps are finished, those at fault and of most growth first;
            or a `stabkit.analysis.Listener`, which is told of the verdict before any spectrum is computed.
        distributed: where a process group runs (``torchrun``), share the work with its other ranks. Every rank must
            then make this call, with the same model and input, and gets the same report. False analyses on this rank
            alone; a model whose parameters are spread over the ranks cannot be.
        ranks: who shares the work; by default all ranks of the process group that runs.
        budget: time that the analysis may take, in seconds or as ``"10m"``. Samples, probes and spectra are left out
            to keep it, and the notes of the report say which.
        memory: bytes that the process may use, or ``"8G"``; likewise.
        optimizer: of the model's parameters, with its state; with a loss, ``training`` of the report then says whether
            its coming updates are stable, by `stabkit.sharpness` and `stabkit.curvature.critical_rate`. That takes
            20 to 100 products with the Hessian of about two training steps each, which are in no plan, and where the
            rate is in doubt up to 80 updates of copies.
        scheduler: of the optimizer's rates, one of ``torch.optim.lr_scheduler``; the report then says the largest rate
            to come beside the largest stable one.
        trained: whether the weights are known to have been trained; remedies of how they start are then no remedies.
        plan_only: analyse nothing but return what it would cost, a `stabkit.planning.Plan`, whose ``str`` is a table.

    Raises:
        StabkitError: not even the least analysis keeps the budget, or there is an optimizer and no loss, or one of
            other parameters.
        TraceError: the model could not be traced, or an argument makes no sense for it. Where nothing leads from the
            input to the output and a loss trains parameters all the same, the report has no steps, and says which
            parameters get no gradient.
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
    model = unwrap(model)
    group = _group(model, inputs, kwargs, distributed, ranks)
    call = Call(inputs, dict(kwargs or {}), batch_dim)
    where = {"depth": depth, "source": source, "target": target, "seed": seed}
    settings = Settings(loss, where, spectrum, spectrum_samples, probes, thresholds or Thresholds(), seed)
    settings = replace(settings, trained=trained)
    if optimizer is not None or scheduler is not None:
        check_optimizer(optimizer, scheduler, model, loss)
        settings = replace(settings, optimizer=optimizer, scheduler=scheduler)
    if plan_only or budget is not None or memory is not None:
        foretold = planned(group, model, call, settings, budget, memory)
        if plan_only:
            return foretold
        call, settings = affordable(foretold, call, settings, budget, memory)
    # products of tensor-parallel models are collective: all ranks do all of them together
    parallel: Parallel = SERIAL if is_tensor_parallel(model) else group
    return _Analysis(model, call, settings, progress, parallel).report(name)


@dataclass(frozen=True)
class _Analysis:
    """One analysis: the verdict first, then what explains it, then the spectra in the order of their importance."""

    model: Any
    call: Call
    settings: Settings
    progress: Progress | Listener | None
    parallel: Parallel

    def report(self, name: str | None) -> Report:
        """Measure everything; the model comes back as it was."""
        began = time.perf_counter()
        chosen, call = self.settings, self.call
        with ExitStack() as stack:
            stack.enter_context(whole_parameters(self.model))
            # the whole analysis, not only the forward pass, must leave the model as it was
            roots = (modules_behind(self.model), self.model, chosen.loss, chosen.optimizer, chosen.scheduler)
            stack.enter_context(unchanged(*roots, given=(call.inputs, call.kwargs)))
            try:
                flow = trace(self.model, *call.inputs, kwargs=call.kwargs, batch_dim=call.batch_dim, **chosen.where)
                flow = flow if chosen.loss is None else flow.following(chosen.loss)
            except UnreachedError as error:
                if chosen.loss is None or not any(p.requires_grad for p in modules_behind(self.model).parameters()):
                    raise
                return self._of_parameters(name, began, str(error))
            if chosen.loss is not None:
                chosen = replace(chosen, where={**chosen.where, "target": flow.target})
            flow = with_statistics(flow)
            stack.enter_context(torch_threads(flow.batch * max((state.size for state in flow.states), default=0)))
            # of numbers that are not finite there are no methods and no spectra to be had, only where they begin
            finite = is_finite(flow, chosen.loss)
            chosen = chosen if finite else replace(chosen, spectrum="none")
            # they are read before the verdict only where that asks for a mechanism
            methods = functools.cache(
                lambda: identify(flow, checks=False, parallel=self.parallel) if finite else unidentified(flow)
            )
            samples = min(flow.batch, max(chosen.spectrum_samples, EXPLAINED))
            shared = SharedSpectra(lambda index: flow.steps[index].jacobian(), samples)
            diagnosis = examine(
                flow,
                chosen.loss,
                thresholds=chosen.thresholds,
                probes=chosen.probes,
                seed=chosen.seed,
                methods=methods,
                spectra=shared,
                parallel=self.parallel,
                trained=chosen.trained,
                # of parameters that are spread over ranks no copies are trained
                optimizer=None if is_spread(self.model) else chosen.optimizer,
            )
            training = None
            if chosen.optimizer is not None:
                diagnosis, training = with_updates(diagnosis, self.model, flow, call, chosen)
            diagnosis = replace(diagnosis, verdict=led_by_findings(diagnosis.verdict, diagnosis.findings))
            told = Told(self.progress, len(flow.steps))
            told.verdict(diagnosis)
            found = methods()
            why = Explanation()
            if chosen.spectrum != "none":
                why = explain(
                    flow,
                    diagnosis,
                    found,
                    samples,
                    chosen.seed,
                    chosen.thresholds,
                    shared,
                    chosen.loss,
                    self.parallel,
                )
            spectra = plan_spectra(
                flow,
                lambda: of_first_samples(flow, self.model, call, chosen.spectrum_samples, chosen.where),
                by_importance(diagnosis),
                mode=chosen.spectrum,
                samples=chosen.spectrum_samples,
                share=chosen.spectrum_share,
                shared=shared,
                seed=chosen.seed,
            )
            told.begin()
            steps = self._steps(flow, diagnosis, found, why, spectra, told)
            exponents, missing = self._exponents(spectra) if finite else (None, ())
        notes = (*spectra.notes, *missing)
        return self._written(name, began, flow, diagnosis, why, steps, exponents, notes, training)

    def _of_parameters(self, name: str | None, began: float, why: str) -> Report:
        """A report without steps: nothing leads from the input to the output, and the loss trains parameters still."""
        chosen, module = self.settings, modules_behind(self.model)
        call = ForwardPass(self.model, module, self.call.inputs, dict(self.call.kwargs), chosen.seed)
        found = findings_without_flow(call, chosen.loss)
        broken = any(finding.kind == "non_finite" for finding in found)
        parameters = list(module.parameters())
        return Report(
            model=name or type(module if isinstance(self.model, nn.Module) else self.model).__name__,
            verdict="non-finite" if broken else "not judged",
            summary="The loss or its gradient is not finite." if broken else f"Not judged: {why}.",
            findings=tuple(found),
            steps=(),
            total_growth=math.nan,
            total_growth_interval=(math.nan, math.nan),
            chain_error=math.nan,
            n_parameters=sum(p.numel() for p in parameters),
            dtype=str(parameters[0].dtype).removeprefix("torch."),
            device=str(parameters[0].device),
            mode="train" if module.training else "eval",
            loss=str(getattr(chosen.loss, "__name__", type(chosen.loss).__name__)),
            seed=chosen.seed,
            seconds=time.perf_counter() - began,
            thresholds=chosen.thresholds.to_dict(),
            notes=(*chosen.given_up, "growth over depth needs a way from the input to the output, and there is none"),
            versions=_versions(),
        )

    def _steps(
        self,
        flow: Flow,
        diagnosis: Diagnosis,
        found: tuple[Identification, ...],
        why: Explanation,
        spectra: StepSpectra,
        told: Told,
    ) -> tuple[StepReport, ...]:
        """The records of all steps, in their order."""
        methods = by_step(found, len(flow.steps))
        order = by_importance(diagnosis)
        costs = [max(spectra.costs.get(index, 0.0), 1.0) for index in order]
        spent = 0.0

        def measured(place: int) -> StepReport:
            nonlocal spent
            index = order[place]
            step, limits = flow.steps[index], self.settings.thresholds
            spectrum = spectra.of(index, methods[index])
            record = step_report(step, methods[index], spectrum, diagnosis.measurement, limits)
            record = why.completed(record)
            spent += costs[place]
            step.segment.release()
            told.step(record, spent / sum(costs))
            return record

        # what a spectrum gives does not depend on who computes it
        done = self.parallel.share(measured, costs, name="step")
        return tuple(sorted(done, key=lambda record: record.index))

    def _exponents(self, spectra: StepSpectra) -> tuple[Exponents | None, tuple[str, ...]]:
        if self.settings.spectrum == "none":
            return None, ()
        (found,) = self.parallel.share(lambda _: lyapunov(spectra.short, self.settings.seed), [1.0], name="exponents")
        return found

    def _written(
        self,
        name: str | None,
        began: float,
        flow: Flow,
        diagnosis: Diagnosis,
        why: Explanation,
        steps: tuple[StepReport, ...],
        exponents: Exponents | None,
        notes: tuple[str, ...],
        training: TrainingReport | None,
    ) -> Report:
        verdict, measurement, chosen = diagnosis.verdict, diagnosis.measurement, self.settings
        last = norms(measurement, -1, flow.states[-1].size, chosen.thresholds)
        return Report(
            model=name or type(flow.model if isinstance(self.model, nn.Module) else self.model).__name__,
            verdict=verdict.name,
            summary=verdict.summary,
            findings=diagnosis.findings,
            steps=steps,
            total_growth=verdict.growth,
            total_growth_interval=verdict.interval,
            chain_error=math.nan if flow.chain_error is None else flow.chain_error,
            n_parameters=sum(p.numel() for p in flow.model.parameters()),
            dtype=str(flow.states[0].space.dtype).removeprefix("torch."),
            device=str(flow.states[0].space.device),
            mode="train" if flow.model.training else "eval",
            loss=measurement.loss,
            seed=chosen.seed,
            seconds=time.perf_counter() - began,
            thresholds=chosen.thresholds.to_dict(),
            explained=why.explained,
            rate_law=why.rate_law,
            lyapunov=exponents,
            training=training,
            **{f"output_{key}": value for key, value in last.items()},
            notes=(
                *chosen.given_up,
                *flow.notes,
                *why.notes,
                *notes,
                *untried_notes(diagnosis),
                *restart_notes(flow, measurement),
                *side_input_notes(flow),
            ),
            versions=_versions(),
        )


def _versions() -> dict[str, str]:
    return {"stabkit": __version__, "torch": torch.__version__, "python": platform.python_version()}


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
