"""What was streamed as a report like any other: verdict, findings, and one record per block."""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING

import numpy as np
import torch

from stabkit._version import __version__
from stabkit.diagnosis import Array, Measurement, StepMeasurement, Thresholds, judge
from stabkit.diagnosis.blocks.outliers import local_findings
from stabkit.diagnosis.depth.stretch import growth_finding
from stabkit.report.schema import Report, StepReport
from stabkit.statistics import mean_interval

if TYPE_CHECKING:
    from stabkit.streaming.profile import StreamedProfile


def report_of(found: StreamedProfile, thresholds: Thresholds | None = None) -> Report:
    """A report of the stack of blocks.

    Findings rest on growth, gains and states alone; activations and weights are not looked at one by one. Eigenvalues
    are not computed.

    Args:
        found: from `stabkit.streaming.analyze_files`.
        thresholds: the limits behind the verdict.
    """
    limits = thresholds or Thresholds()
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
