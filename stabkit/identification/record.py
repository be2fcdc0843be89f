"""The record of one reading: a method, its name, and how both are known."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

from stabkit.identification.evidence.confirmation import Check
from stabkit.identification.fields.recorded_fields import RecordedField
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import NO_STEP, Name
from stabkit.integrators import GeneralLinearMethod, LinearStability
from stabkit.results import Result

_NOTE = 90  # letters of the first note that a line shows


@dataclass(frozen=True)
class Recurrence(Result):
    """The method of a recurrence over time inside a step of depth: a scan written as a loop, a cell written by hand.

    Attributes:
        name: ``"exponential step (exact in the state, |a| from 0.2 to 0.7)"``, ``"gated Euler (mean a = 0.48)"``, ...
        system: the continuous system in time, in words.
        evidence: ``"proven"`` (for every input), ``"measured"`` or ``"unknown"``.
        residual: relative deviation in the numerical test behind the name; None where there is none.
        module_path: the module in which it runs.
        n_steps: how many steps over time there are, with a first from constants and a last of which not all is read.
        low: smallest modulus of an eigenvalue of a time step that is linear in its state; None for others.
        high: the largest.
        growth: what a random cotangent gains a time step on its way back, mean over time, nats; inputs are held fixed.
        fed: whether numbers that are made of the input multiply the state.
        method: the general linear method; None where none was read, as for the exponential.
        notes: what else was seen.
    """

    name: str
    system: str
    evidence: str
    residual: float | None
    module_path: str
    n_steps: int
    low: float | None = None
    high: float | None = None
    growth: float | None = None
    fed: bool = False
    method: LinearStability | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: where, how long, the method, and how sure."""
        where = f" of {self.module_path}" if self.module_path else ""
        residual = "" if self.residual is None else f", residual {self.residual:.1g}"
        grows = "" if self.growth is None else f"; gradients change by {self.growth:+.3g} nats a step"
        told = "".join(f"; {note}" for note in self.notes)
        read = f"{self.name}, {self.evidence}{residual}; {self.system}"
        return f"over time, {self.n_steps} steps{where}: {read}{grows}{told}"

    def _contents(self) -> dict[str, Any]:
        return {name: value for name, value in super()._contents().items() if name != "method"}


@dataclass(frozen=True)
class Identification(Result):
    """The method that one step, or several together, implement.

    Attributes:
        name: ``"forward Euler"``, ``"damped Euler (a = 0.78)"``, ``"rk4"``, ``"plain"``, ``"transition"``,
            ``"unknown"``, ...
        method: the general linear method, with z = h times the eigenvalue of the Jacobian of a field; None where none
            was read.
        skip: the coefficient ``a`` of x' = a x + f(x), of entries with numbers of their own the mean; None where none
            was read.
        step_size: the step size h; only the product h f can be seen, so ``convention`` says how it was fixed.
        convention: how h was fixed.
        evidence: ``"proven"`` (read off the graph and confirmed), ``"measured"`` or ``"unknown"``.
        residual: relative deviation of the skip from ``a`` times the identity, measured on random cotangents.
        steps: indices of the steps that make up the method.
        after: operations that follow the addition, such as a ReLU or a norm.
        notes: what else was seen.
        system: the continuous system that the method integrates, in words.
        shared_weights: whether stages of one step evaluate the same field with the same weights; None for one stage,
            and where different fields have some of their weights in common.
        checks: numerical confirmations.
        over_time: recurrences over time inside these steps, each with the method of its own steps.
        recorded: where h times the field of every stage was evaluated; None where that cannot be told, and empty where
            no stages were read.
    """

    name: str
    method: LinearStability | None
    skip: float | None
    step_size: float | None
    convention: str
    evidence: str
    residual: float | None
    steps: tuple[int, ...]
    after: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    system: str = ""
    shared_weights: bool | None = None
    checks: tuple[Check, ...] = ()
    over_time: tuple[Recurrence, ...] = ()
    recorded: tuple[RecordedField | None, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        """One line: which steps, the method, its step size and convention, how sure, what it integrates, a note."""
        first, last = self.steps[0], self.steps[-1]
        parts = [f"step {first}" if first == last else f"steps {first} to {last}", self.name]
        if self.step_size is not None:
            parts.append(f"h = {self.step_size:.4g} ({self.convention.removeprefix('h: ').removeprefix('h = 1: ')})")
        residual = "" if self.residual is None else f", residual {self.residual:.1g}"
        parts.append(f"{self.evidence}{residual}")
        system = "" if self.system.startswith("none") or not self.system else f"; {self.system}"
        note = f"; {textwrap.shorten(self.notes[0], _NOTE, placeholder=' ...')}" if self.notes else ""
        if self.over_time and (not self.notes or self.notes[0] != str(self.over_time[0])):
            note += f"; over time: {', '.join(dict.fromkeys(found.name for found in self.over_time))}"
        return f"{parts[0]}: {', '.join(parts[1:])}{system}{note}"

    def _contents(self) -> dict[str, Any]:
        blocks = ("A", "U", "B", "V")
        tableau = {name: getattr(self.method, name) for name in blocks if hasattr(self.method, name)}
        named = {name: value for name, value in super()._contents().items() if name not in ("method", "recorded")}
        return {**named, "tableau": tableau or None}


def nothing(steps: tuple[int, ...], name: str, why: str, evidence: str, *, system: str = "none") -> Identification:
    """The record of steps in which no method was read."""
    return Identification(name, None, None, None, "none", evidence, None, steps, (), (why,), system)


def record_of(
    named: Name,
    table: Blocks | None,
    steps: tuple[int, ...],
    *,
    skip: float | None,
    residual: float | None,
    after: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Identification:
    """The record of a name, with the tableau that it is the name of; proven, unless the reader says otherwise."""
    method: LinearStability = GeneralLinearMethod([[0]], [[1]], [[1]], [[0]], name="plain")
    if table is not None:
        method = table.method(named.unit)
        method.name = named.name
    return Identification(
        name=named.name,
        method=method,
        skip=skip,
        step_size=None if named.convention == NO_STEP else named.h,
        convention=named.convention,
        evidence="proven",
        residual=residual,
        steps=steps,
        after=after,
        notes=notes,
        system=named.system,
        shared_weights=None if table is None else table.weights_shared,
        recorded=() if table is None else table.recorded_with(named.unit),
    )
