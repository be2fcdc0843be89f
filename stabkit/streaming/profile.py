"""What is known of a stack of blocks after it was streamed, and that as a report like any other."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit._version import __version__
from stabkit.diagnosis import Array, Measurement, StepMeasurement, Thresholds, judge
from stabkit.diagnosis.blocks.outliers import local_findings
from stabkit.diagnosis.depth.findings import growth_finding
from stabkit.report import Report, StepReport
from stabkit.results import Result
from stabkit.statistics import mean_interval


@dataclass(frozen=True)
class Method:
    """What `stabkit.identify` says of a block.

    Attributes:
        name: the name of the integrator.
        skip: a of x' = a x + f(x); None when no such form was read.
        evidence: how sure that is.
        residual: the residual of the numerical test behind it.
    """

    name: str
    skip: float | None
    evidence: str
    residual: float | None


@dataclass(frozen=True)
class StreamedProfile(Result):
    """What is known of a stack of blocks, per sample.

    Attributes:
        model: the class of the model.
        names: module paths of the blocks.
        gradient_norms: ``(states, batch)``, geometric mean over the probes of the norm of the cotangent at a state.
        state_norms: ``(states, batch)``.
        log_growth: ``(steps, batch)``, nats: log of the norm before a block over that after it, mean over the probes.
        all_log_growth: ``(probes, steps, batch)``.
        singular_values: ``(steps, batch, k)``, descending; None when none were asked for.
        residuals: the residuals of the singular values, as `stabkit.singular_values` gives them.
        converged: whether they have converged.
        seed: the seed of the first probe.
        reused: blocks whose results were in ``out`` already, forward and back.
        weight_bytes: the size of the weight files in bytes.
        notes: what was held fixed.
        gains: ``(steps, batch)``, 1/2 log(|J|_F^2 / m) estimated from two fresh random cotangents, nats.
        methods: what integrator each block is.
        state_shape: the shape of one sample's state.
        block_class: the class of the blocks.
        n_parameters: the number of parameters of the whole model.
        dtype: the dtype of the weights and states while they were used.
        device: where they were.
        chain_error: the largest over the blocks of the relative distance of a step VJP from autograd's.
        seconds: that this run took, without what it found on disk.
    """

    model: str
    names: tuple[str, ...]
    gradient_norms: Tensor
    state_norms: Tensor
    log_growth: Tensor
    all_log_growth: Tensor
    singular_values: Tensor | None
    residuals: Tensor | None
    converged: Tensor | None
    seed: int
    reused: int
    weight_bytes: int
    notes: tuple[str, ...]
    gains: Tensor
    methods: tuple[Method, ...]
    state_shape: tuple[int, ...]
    block_class: str
    n_parameters: int
    dtype: str
    device: str
    chain_error: float
    seconds: float

    @property
    def description(self) -> str:
        """What was read, in a sentence."""
        again = f"; {self.reused} results were there already" if self.reused else ""
        return (
            f"{self.model}: {len(self.names)} blocks streamed from {self.weight_bytes / 1e9:.3g} GB of weights{again}"
        )

    def report(self) -> Report:
        """The same as a report that can be printed, saved, drawn and compared like that of `stabkit.analyze`."""
        return _report(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.names)} blocks, {self.weight_bytes / 1e9:.2f} GB of weights"]
        for i, name in enumerate(self.names):
            norm = "" if self.singular_values is None else f"  |J| {float(self.singular_values[i].max()):.4g}"
            lines.append(f"  {name:32s} growth {float(self.log_growth[i].mean()):+.4f} nats{norm}")
        lines.append(f"  in all {float(self.log_growth.sum(0).mean()):+.4f} nats over {len(self.names)} blocks")
        return "\n".join(lines)


def _report(found: StreamedProfile) -> Report:
    """A report of the stack of blocks.

    Findings rest on growth, gains and states alone; activations and weights are not looked at one by one. Eigenvalues
    are not computed.
    """
    limits = Thresholds()
    growth = _columns(found)
    verdict = judge(growth, ["step"] * len(found.names), limits)
    measurement = _measurement(found, growth)
    findings = local_findings(measurement, limits) if np.isfinite(growth).all() else []
    findings += growth_finding(verdict, measurement, {}, limits)
    return Report(
        model=found.model,
        verdict=verdict.name,
        summary=verdict.summary,
        findings=tuple(findings),
        steps=tuple(_step(found, i, growth[i], limits) for i in range(len(found.names))),
        total_growth=verdict.growth,
        total_growth_interval=verdict.interval,
        chain_error=found.chain_error,
        n_parameters=found.n_parameters,
        dtype=found.dtype,
        device=found.device,
        mode="eval",
        loss=f"{len(found.all_log_growth)} standard normal cotangents per sample, at the last block",
        seed=found.seed,
        seconds=found.seconds,
        thresholds=limits.to_dict(),
        notes=(
            "streamed: the weights of one block at a time; embedding, head and eigenvalues are left out",
            *found.notes,
        ),
        versions={"stabkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def _columns(found: StreamedProfile) -> Array:
    """``(steps, probes times samples)``."""
    rows = found.all_log_growth.permute(1, 0, 2).flatten(1)
    return np.asarray(rows.double().numpy())


def _measurement(found: StreamedProfile, growth: Array) -> Measurement:
    with np.errstate(divide="ignore"):
        sizes = np.log(found.state_norms.double().numpy()) - 0.5 * math.log(max(math.prod(found.state_shape), 1))
        gradients = np.log(found.gradient_norms.double().numpy())
    gains = found.gains.double().numpy()
    steps = tuple(
        StepMeasurement(
            index=i,
            name=name,
            module_path=name,
            module_class=found.block_class,
            kind="step",
            space=((found.state_shape,), (found.state_shape,)),
            gain=gains[i],
            log_change=float((sizes[i + 1] - sizes[i]).mean()),
        )
        for i, name in enumerate(found.names)
    )
    probes = len(found.all_log_growth)
    return Measurement(steps, growth, gradients, sizes, (), "standard normal cotangents", probes)


def _step(found: StreamedProfile, index: int, growth: Array, limits: Thresholds) -> StepReport:
    size, name = math.prod(found.state_shape), found.names[index]
    finite = bool(np.isfinite(growth).all())
    mean = float(growth.mean())
    read = found.methods[index]
    norm, converged = None, False
    if found.singular_values is not None and found.converged is not None:
        norm, converged = float(found.singular_values[index].max()), bool(found.converged[index].all())
    return StepReport(
        index=index,
        name=name,
        module_path=name,
        kind="step",
        source_shapes=(found.state_shape,),
        target_shapes=(found.state_shape,),
        source_size=size,
        target_size=size,
        method=read.name,
        skip=read.skip,
        evidence=read.evidence,
        residual=read.residual,
        largest_singular_value=norm,
        spectrum_method="none" if norm is None else "krylov",
        spectrum_converged=converged,
        growth=mean,
        growth_interval=mean_interval(growth, limits.confidence) if finite else (mean, mean),
        gradient_norm=_geometric_mean(found.gradient_norms[index]),
        state_norm=_geometric_mean(found.state_norms[index]),
        notes=("the largest singular value has not converged",) if norm is not None and not converged else (),
    )


def _geometric_mean(norms: torch.Tensor) -> float:
    return float(norms.double().log().mean().exp())
