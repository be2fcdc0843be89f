"""What a report holds, field by field, and how people see each; knows no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stabkit.diagnosis import VERDICTS, Finding, factor
from stabkit.errors import ArgumentError
from stabkit.report.formats import figures, percent, room, shapes, signed
from stabkit.report.shown import shown
from stabkit.report.training import TrainingReport
from stabkit.results import Result
from stabkit.text import printable

ROUNDING = 1e-4  # how far |a + z| may exceed 1 by rounding before an eigenvalue counts as outside the region

SCHEMA = "stabkit.report/1"

STEP_KINDS = ("step", "transition")
EVIDENCE = ("proven", "measured", "statistical", "convention", "unknown")
SPECTRUM_METHODS = ("dense", "krylov", "none")


def _sizes(step: StepReport) -> str:
    """Numbers per sample before and after a step, once when they are equal."""
    if step.source_size == step.target_size:
        return str(step.source_size)
    return f"{step.source_size}>{step.target_size}"


def _between(ends: tuple[float, float] | None, text: Callable[[float], str]) -> str:
    """The ends of an interval that has a width."""
    return "" if ends is None or not ends[0] < ends[1] else f"({text(ends[0])} to {text(ends[1])})"


def _read(step: StepReport) -> str:
    """How far the method is to be trusted."""
    return f"({step.evidence}{'' if step.residual is None else f', residual {figures(step.residual, 2)}'})"


def _factor(step: StepReport) -> str:
    """The growth of a step as a factor, with its interval in nats."""
    return f"nats {_between(step.growth_interval, signed)}, ×{factor(step.growth)}"


def _solved(step: StepReport) -> str:
    """How the spectrum was computed, and whether it can be relied on."""
    if step.spectrum_method == "none":
        return "none"
    return f"{step.spectrum_method}, {'converged' if step.spectrum_converged else 'NOT converged'}"


def _radius(step: StepReport) -> str:
    """The spectral radius, marked where it has not converged."""
    doubtful = step.spectral_radius is not None and not step.spectrum_converged
    return ("~" if doubtful else "") + figures(step.spectral_radius)


def outside(step: StepReport) -> str:
    """The share outside the region; "at least" where every eigenvalue that was computed lies there, of more.

    Of 16,384 eigenvalues two may be known: where the smaller one is inside, so are all others; else nothing is.
    """
    a = step.skip or 0.0
    known = step.outside_share is None or step.spectrum_method != "krylov" or not step.z
    if known or any(abs(a + z) <= 1.0 + ROUNDING for z in step.z or ()):
        return percent(step.outside_share)
    return f">{math.floor(100 * (step.outside_share or 0.0))}%"


def _shares(step: StepReport) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in (step.mechanism or {}).items())


@dataclass(frozen=True, kw_only=True)
class StepReport:
    r"""What was measured at one step of the flow.

    Shapes and sizes are those of one sample. A value that was not computed is None; one that came out as not
    finite stays so.

    Attributes:
        index: position in the flow, 0 at the input.
        name: what a person would call the step.
        module_path: the module that does its work, as in ``model.named_modules()``.
        kind: ``"step"`` (same shapes in and out) or ``"transition"`` (a change of space).
        source_shapes: shapes of the tensors of the state before the step.
        target_shapes: shapes of the tensors of the state after it.
        source_size: numbers in the state before the step.
        target_size: numbers in the state after it.
        method: the integrator that the step implements, in words.
        skip: a of x' = a x + f(x), None when no such form was read; ``z`` is then taken with a = 0.
        evidence: how sure the method is, one of ``EVIDENCE``.
        residual: relative residual of the numerical test behind ``evidence``.
        z: eigenvalues of J - a of all analysed samples, one after another.
        field_z: where the method has several stages, h eig(J_f) of each field, the z of one mode at one place; None
            where ``z`` says it already, or the fields could not be differentiated.
        numerical_range: points around the boundary of the numerical range of J - a at the first sample.
        spectral_radius: largest \|eigenvalue\| of J.
        largest_singular_value: largest singular value of J, the worst growth in one step.
        outside_share: share of the spectrum with \|a + z\| > 1, from 0 to 1; at least this when only the
            largest eigenvalues were computed.
        spectrum_method: how the eigenvalues were computed, one of ``SPECTRUM_METHODS``.
        spectrum_converged: whether every eigenvalue in ``z`` has converged.
        growth: log of the gradient norm before the step over that after it, mean over samples, in nats.
        growth_interval: confidence interval of ``growth``, in nats.
        gradient_norm: geometric mean over samples of the gradient norm before the step.
        state_norm: geometric mean over samples of the norm of the state before the step.
        gradient_norm_interval: confidence interval of ``gradient_norm`` over samples.
        state_norm_interval: confidence interval of ``state_norm`` over samples.
        step_size: the step size h of the method; 1 by convention where only h f can be seen.
        convention: how ``step_size`` was fixed.
        after: operations behind the addition, such as a ReLU or a norm.
        tableau: the blocks ``A``, ``U``, ``B`` and ``V`` of the method, in rows.
        stage_fields: the field that each stage of the method evaluates, numbered from 0.
        attribution: parts of ``growth`` by name, means over samples, in nats; they sum to it.
        mechanism: shares of the spectrum's energy, from 0 to 1, by what happens to it (``continuous`` and
            ``discretisation`` instability, ``overdamped``, ``neutral``).
        margin: distance of the spectrum from the boundary of the region in the plane of z, negative outside.
        step_factor: largest factor on the branch that keeps in the region every mode that the field does not amplify.
        operations: names of the operations that the step consists of, in order.
        notes: what the reader should know about these numbers.

    Raises:
        ArgumentError: ``kind``, ``evidence`` or ``spectrum_method`` is not one of the words above.
    """

    index: int = shown(text=lambda step: str(step.index), column="#", sortable=True)
    name: str = shown(text=lambda step: printable(step.name), column="name", is_text=True, sortable=True)
    module_path: str = shown("Module", lambda step: step.module_path or "-")
    kind: str = shown(
        text=lambda step: "trans" if step.kind == "transition" else step.kind, column="kind", is_text=True
    )
    source_shapes: tuple[tuple[int, ...], ...] = shown(
        "State", lambda step: f"{shapes(step.source_shapes)} → {shapes(step.target_shapes)}", column="size", cell=_sizes
    )
    target_shapes: tuple[tuple[int, ...], ...]
    source_size: int
    target_size: int
    method: str = shown(
        "Method",
        lambda step: ", then ".join(filter(None, (step.method, ", ".join(step.after)))),
        default="unknown",
        aside=_read,
        column="method",
        cell=lambda step: printable(step.method),
        sortable=True,
        is_text=True,
    )
    skip: float | None = None
    evidence: str = shown(
        text=lambda step: step.evidence, default="unknown", column="evidence", is_text=True, wide=True, sortable=True
    )
    residual: float | None = None
    step_size: float | None = shown(
        "Step size",
        lambda step: "" if step.step_size is None else figures(step.step_size),
        default=None,
        aside=lambda step: step.convention,
    )
    convention: str = ""
    after: tuple[str, ...] = ()
    tableau: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    stage_fields: tuple[int, ...] = ()
    z: tuple[complex, ...] | None = shown(default=None, counted="n_eigenvalues")
    field_z: tuple[tuple[complex, ...], ...] | None = None
    numerical_range: tuple[complex, ...] | None = None
    spectral_radius: float | None = shown(
        "Largest |eigenvalue|",
        lambda step: figures(step.spectral_radius),
        default=None,
        column="radius",
        cell=_radius,
        sortable=True,
        meaning="largest |eigenvalue| of the step's Jacobian",
    )
    largest_singular_value: float | None = shown(
        "Largest singular value",
        lambda step: figures(step.largest_singular_value),
        default=None,
        column="sigma",
        sortable=True,
        meaning="its largest singular value",
    )
    outside_share: float | None = shown(
        "Spectrum outside",
        outside,
        default=None,
        aside=_solved,
        column="out",
        sortable=True,
        meaning="share of the eigenvalues outside the stability region (> where only such were computed)",
    )
    spectrum_method: str = "none"
    spectrum_converged: bool = False
    margin: float | None = shown(
        "Margin to the boundary",
        lambda step: "" if step.margin is None else signed(step.margin, 3),
        default=None,
        aside=lambda step: "" if step.step_factor is None else room(step.step_factor),
    )
    step_factor: float | None = None
    mechanism: Mapping[str, float] | None = shown("Mechanism", _shares, default=None)
    growth: float = shown(
        "Growth",
        lambda step: signed(step.growth),
        aside=_factor,
        column="growth",
        sortable=True,
        meaning="log of the gradient norm before the step over that after it, in nats",
    )
    growth_interval: tuple[float, float]
    attribution: Mapping[str, float] | None = None
    gradient_norm: float = shown(
        "Gradient norm before it",
        lambda step: figures(step.gradient_norm),
        aside=lambda step: _between(step.gradient_norm_interval, figures),
        column="gradient",
        wide=True,
        sortable=True,
    )
    gradient_norm_interval: tuple[float, float] | None = None
    state_norm: float = shown(
        "State norm before it",
        lambda step: figures(step.state_norm),
        aside=lambda step: _between(step.state_norm_interval, figures),
        sortable=True,
    )
    state_norm_interval: tuple[float, float] | None = None
    operations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, STEP_KINDS)
        _one_of("evidence", self.evidence, EVIDENCE)
        _one_of("spectrum_method", self.spectrum_method, SPECTRUM_METHODS)


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """The largest Lyapunov exponents over the whole flow, of the first sample; see ``stabkit.lyapunov_spectrum``.

    Attributes:
        exponents: ``(1, k)``, nats per step, in falling order.
        standard_errors: ``(1, k)``, nats per step.
        converged: ``(1, k)``.
        local_growth: ``(steps, 1, k)``, nats.
    """

    exponents: tuple[tuple[float, ...], ...]
    standard_errors: tuple[tuple[float, ...], ...]
    converged: tuple[tuple[bool, ...], ...]
    local_growth: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True, kw_only=True)
class ReportFields(Result):
    """What a report holds; `stabkit.Report` is these fields with the ways to print, save and read them.

    Attributes:
        model: the class of the model, or what it was loaded from.
        verdict: one of `stabkit.diagnosis.VERDICTS`.
        summary: the verdict in a sentence or two.
        findings: diagnosed facts, see ``stabkit.diagnosis``.
        steps: one record per step, input first.
        total_growth: log of the gradient norm before the first block over that after the last, mean over
            samples, nats; transitions before and behind the blocks (stem, head) do not count.
        total_growth_interval: confidence interval of ``total_growth``, nats.
        chain_error: relative distance of the product of the step VJPs from the model's own VJP.
        n_parameters: number of parameters of the model.
        dtype: dtype of the analysis.
        device: device of the analysis.
        mode: ``"train"`` or ``"eval"``.
        loss: what was differentiated, in words.
        seed: seed of every random choice.
        seconds: wall-clock time of the analysis.
        thresholds: the limits behind the verdict.
        explained: how much of the growth the stability functions account for, by name of the number; ``"why"`` is
            the answer in a sentence.
        rate_law: how growth depends on depth: the law chosen and the evidence for it.
        lyapunov: Lyapunov exponents over the flow; None where they were not computed.
        training: whether the coming updates of an optimizer are stable; None where none was given.
        output_gradient_norm: geometric mean over samples of the gradient norm behind the last step.
        output_gradient_norm_interval: its confidence interval over samples.
        output_state_norm: geometric mean over samples of the norm of the last state.
        output_state_norm_interval: its confidence interval over samples.
        notes: what the reader should know about the whole.
        versions: versions of stabkit and of what it stands on.

    Raises:
        ArgumentError: ``verdict`` is not one of these words.
    """

    step_type: ClassVar[type] = StepReport

    model: str
    verdict: str
    summary: str
    findings: tuple[Finding, ...]
    steps: tuple[StepReport, ...]
    total_growth: float
    total_growth_interval: tuple[float, float]
    chain_error: float
    n_parameters: int
    dtype: str
    device: str
    mode: str
    loss: str
    seed: int
    seconds: float
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    explained: Mapping[str, Any] = field(default_factory=dict)
    rate_law: Mapping[str, Any] = field(default_factory=dict)
    lyapunov: Exponents | None = None
    training: TrainingReport | None = None
    output_gradient_norm: float | None = None
    output_gradient_norm_interval: tuple[float, float] | None = None
    output_state_norm: float | None = None
    output_state_norm_interval: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("verdict", self.verdict, VERDICTS)

    def _contents(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **super()._contents()}


def _one_of(name: str, value: str, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise ArgumentError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
