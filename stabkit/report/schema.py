"""The result of an analysis as plain data: it can be printed, saved, read back and compared without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabkit.diagnosis import KINDS as DIAGNOSES
from stabkit.diagnosis import Finding
from stabkit.errors import ArgumentError
from stabkit.results import Result

if TYPE_CHECKING:
    import os

    import pandas

SCHEMA = "stabkit.report/1"

VERDICTS = (
    "stable",
    "drift",
    "exploding",
    "vanishing",
    "transient growth",
    "chaotic",
    "inconclusive",
    "non-finite",
)
KINDS = ("step", "transition")
EVIDENCE = ("proven", "measured", "statistical", "convention", "unknown")
SPECTRUM_METHODS = ("dense", "krylov", "none")
SEVERITIES = ("info", "warning", "critical")  # in rising order
FINDINGS = DIAGNOSES

Shapes = tuple[tuple[int, ...], ...]


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
        parameter_gradient_norm: norm of the loss gradient with respect to the parameters that the step uses.
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

    index: int
    name: str
    module_path: str
    kind: str
    source_shapes: Shapes
    target_shapes: Shapes
    source_size: int
    target_size: int
    method: str = "unknown"
    skip: float | None = None
    evidence: str = "unknown"
    residual: float | None = None
    z: tuple[complex, ...] | None = None
    field_z: tuple[tuple[complex, ...], ...] | None = None
    numerical_range: tuple[complex, ...] | None = None
    spectral_radius: float | None = None
    largest_singular_value: float | None = None
    outside_share: float | None = None
    spectrum_method: str = "none"
    spectrum_converged: bool = False
    growth: float
    growth_interval: tuple[float, float]
    gradient_norm: float
    state_norm: float
    gradient_norm_interval: tuple[float, float] | None = None
    state_norm_interval: tuple[float, float] | None = None
    parameter_gradient_norm: float | None = None
    step_size: float | None = None
    convention: str = ""
    after: tuple[str, ...] = ()
    tableau: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    stage_fields: tuple[int, ...] = ()
    attribution: Mapping[str, float] | None = None
    mechanism: Mapping[str, float] | None = None
    margin: float | None = None
    step_factor: float | None = None
    operations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
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
class Report(Result):
    """The result of ``stabkit.analyze``: verdict, findings and one record per step.

    Attributes:
        model: the class of the model, or what it was loaded from.
        verdict: one of ``VERDICTS``.
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
        output_gradient_norm: geometric mean over samples of the gradient norm behind the last step.
        output_gradient_norm_interval: its confidence interval over samples.
        output_state_norm: geometric mean over samples of the norm of the last state.
        output_state_norm_interval: its confidence interval over samples.
        notes: what the reader should know about the whole.
        versions: versions of stabkit and of what it stands on.

    Raises:
        ArgumentError: ``verdict`` is not one of ``VERDICTS``.

    Example:
        >>> report = Report(
        ...     model="MLP", verdict="stable", summary="Gradients keep their size.", findings=(), steps=(),
        ...     total_growth=0.1, total_growth_interval=(0.0, 0.2), chain_error=1e-15, n_parameters=12,
        ...     dtype="float64", device="cpu", mode="eval", loss="random cotangent", seed=0, seconds=0.01,
        ... )
        >>> report.to_dict()["schema"]
        'stabkit.report/1'
    """

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
    output_gradient_norm: float | None = None
    output_gradient_norm_interval: tuple[float, float] | None = None
    output_state_norm: float | None = None
    output_state_norm_interval: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("verdict", self.verdict, VERDICTS)

    def __str__(self) -> str:
        from stabkit.report import tables

        return tables.plain(self)

    def _contents(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **super()._contents()}

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per step, the columns of the CSV file, as a ``pandas.DataFrame`` indexed by ``index``.

        Raises:
            ReportError: pandas is not installed.
        """
        from stabkit.report import tables

        return tables.dataframe(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file, whole or not at all.

        Args:
            path: the suffix says what is written: ``.html`` (a page to look at), ``.json`` (everything), ``.csv`` (one
                row per step), ``.png``, ``.svg`` or ``.pdf`` (three plots side by side).

        Returns:
            The path that was written.

        Raises:
            ReportError: the suffix is unknown, or the file cannot be written.
        """
        from stabkit.report import files

        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report from a ``.json`` file that ``save`` wrote.

        Raises:
            ReportError: there is no such file, or it is not a whole report of schema ``stabkit.report/1``.
        """
        from stabkit.report import files

        return files.load(path)


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ArgumentError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
