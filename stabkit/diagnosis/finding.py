"""One diagnosed fact, with the numbers behind it and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stabkit.diagnosis.kinds import FINDINGS, SEVERITIES, rank
from stabkit.errors import ArgumentError
from stabkit.results import Result

if TYPE_CHECKING:
    from stabkit.tracing import Flow

Action = Mapping[str, Any]

#: among the numbers of a finding: what a short training with its remedy leaves of the loss, over what it leaves without
LEARNT = "learnt"
LOSS = "loss"  # in place of a path, where what is wrong lies in the loss


@dataclass(frozen=True)
class Finding(Result):
    """One diagnosed fact.

    Attributes:
        kind: one of `stabkit.diagnosis.FINDINGS`.
        severity: one of `stabkit.diagnosis.SEVERITIES`.
        steps: indices of the steps where it happens.
        module_path: the module at fault, or the one that contributes most.
        confidence: how sure the finding is, 0 to 1.
        evidence: the numbers behind it, in words.
        remedy: what to change.
        reference: where the reasoning comes from.
        numbers: the numbers behind it, by name.
        actions: the remedy as data, each of one of the forms that `stabkit.diagnosis.apply` carries out, such as
            ``{"action": "scale", "parameter": "layers.3.weight", "factor": 0.2}``.

    Raises:
        ArgumentError: ``kind`` or ``severity`` is no word of the diagnosis.
    """

    kind: str
    severity: str
    steps: tuple[int, ...]
    module_path: str
    confidence: float
    evidence: str
    remedy: str
    reference: str
    numbers: Mapping[str, float] = field(default_factory=dict, compare=False)
    actions: tuple[Action, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, FINDINGS), ("severity", self.severity, SEVERITIES)):
            if value not in known:
                raise ArgumentError(f"{name}={value!r}; accepted: {', '.join(map(repr, known))}")


def of_last_step(
    flow: Flow,
    kind: str,
    severity: str,
    path: str,
    evidence: str,
    remedy: str,
    reference: str,
    numbers: Mapping[str, float] | None = None,
    actions: tuple[Action, ...] = (),
) -> Finding:
    """A finding that is sure, at the end of a flow: on the loss, or on a module that shows in what the loss gives."""
    last = (len(flow.steps) - 1,)
    return Finding(kind, severity, last, path, 1.0, evidence, remedy, reference, numbers or {}, actions)


def of_module(
    flow: Flow,
    kind: str,
    severity: str,
    path: str,
    evidence: str,
    remedy: str,
    reference: str,
    numbers: Mapping[str, float] | None = None,
    actions: tuple[Action, ...] = (),
) -> Finding:
    """A finding that is sure, in the step in which a module runs first."""
    from stabkit.diagnosis.blocks.weights import step_of  # reports hold findings, and are read without torch

    step = (step_of(flow, path),)
    return Finding(kind, severity, step, path, 1.0, evidence, remedy, reference, numbers or {}, actions)


def of_training(
    kind: str, severity: str, evidence: str, remedy: str, reference: str, numbers: Mapping[str, float]
) -> Finding:
    """A finding that is sure, on a training as a whole: on its updates or its loss, and on no module."""
    return Finding(kind, severity, (), "", 1.0, evidence, remedy, reference, numbers)


def serious(finding: Finding) -> bool:
    """Whether it is a warning or worse."""
    return rank(finding.severity) >= rank("warning")


def as_fact(finding: Finding, words: str, remedy: str) -> Finding:
    """A finding that calls for nothing of its own, with the words that say why."""
    evidence = f"{finding.evidence}; {words}"
    return replace(finding, severity="info", evidence=evidence, remedy=remedy, actions=())


_NEAR_ONE = math.log(1.02)  # factors closer to 1 change nothing that matters, however often they act, nats
_SURE = 0.5  # confidence under which a finding is more likely wrong than right


def sound(finding: Finding) -> Finding | None:
    """A finding fit to be told, or None: the one place where nonsense is kept from a reader.

    A finding that is more likely wrong than right is dropped. A remedy that multiplies by about 1, by nothing, or by
    what is not a number is no remedy, and the finding is told without one.

    Example:
        >>> odd = Finding("saturated", "warning", (0,), "a", 0.9, "", "multiply by 1", "", actions=(
        ...     {"action": "scale", "parameter": "a.weight", "factor": 1.0},))
        >>> sound(odd).remedy, sound(odd).actions
        ('nothing simple: no factor that was computed changes it', ())
    """
    if not finding.confidence >= _SURE:
        return None
    numbers = {name: value for name, value in finding.numbers.items() if math.isfinite(value)}
    useful = all(_changes(action) for action in finding.actions)
    if useful:
        return replace(finding, numbers=numbers)
    return replace(
        finding, numbers=numbers, remedy="nothing simple: no factor that was computed changes it", actions=()
    )


def _changes(action: Action) -> bool:
    """Whether an action changes something, by a number that is one."""
    if action.get("action") not in ("scale", "scale_input"):
        return all(math.isfinite(value) for value in action.values() if isinstance(value, float))
    factor = float(action["factor"])
    return factor > 0 and math.isfinite(factor) and abs(math.log(factor)) > _NEAR_ONE
