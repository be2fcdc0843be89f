"""The method over time of a recurrence inside a step of depth: a scan written as a loop, a cell written by hand.

The blocks of a state-space model, of linear attention in its recurrent form or of a liquid network are steps of depth
whose branch runs over time. What the branch does there is a step of its own, from one state to the next with the input
held fixed, and is read by the same rules, but for what is affine in its state: there is no field to be found, and the
numbers that multiply the state say which rule was meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import Node

from stabkit import integrators
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, MOVES, PRODUCTS_ADDED, has_matrix, is_affine
from stabkit.identification.reading import read
from stabkit.identification.record import Identification, Recurrence
from stabkit.identification.steps.linear_recurrence import Coupling, coupling
from stabkit.identification.steps.step_rules import Histories, Made
from stabkit.identification.time.long_convolutions import powers_of_kernels
from stabkit.identification.time.rates import rates, rates_of_oscillators, rule_of_constants
from stabkit.identification.time.rescaled import is_maximum, maximum_of, without_maximum
from stabkit.integrators import LinearStability
from stabkit.tracing import Flow
from stabkit.tracing.graph.scans import Scan
from stabkit.tracing.graph.values import Value, operation
from stabkit.tracing.maps.scan_flow import growth_over, over_scan, scans_of

_CLOSE = 1e-5  # of invariants of 2 x 2 blocks in single precision
_CALLED = {
    "exponential": ("exponential step (exact in the state", "x' = A x + B u, the state carried on exactly"),
    "trapezoid": ("trapezoid (bilinear", "x' = A x + B u"),
    "backward Euler": ("backward Euler (linear", "x' = A x + B u"),
}
_TIMES = 3  # at which the numbers of a recurrence are compared
_MIXTURES = frozenset({"Addcmul", "Lerp"})  # affine in any one of their arguments
_METHODS = {"trapezoid": "trapezoid", "backward Euler": "backward_euler"}
_WITHOUT_NUMBERS = ("plain", "forward Euler")  # names that claim none, so that they hold whatever the input makes
_FOLLOWS = "the weight of the input is made of the same h A as the factor of the state"
_BOTH_ENDS = "u at both ends of the step"
_WEIGHTS = {
    "held": "the weight of the input has the factor a - 1, as that of an input held over the step has (ZOH)",
    "variance": "the input has the weight sqrt(1 - |a|^2), not that of a held input (ZOH): it keeps the variance of a "
    "state that white noise drives (exact for a process of Ornstein and Uhlenbeck)",
}
_CONVOLVED = "computed as a convolution by Fourier transforms, whose kernel is a sum of powers of these numbers"
_EXPLICIT = "state and input have a factor h in common: explicit Euler with the step h"
_OWN = "the input enters with a weight that is made of other numbers, such as h B"


class Recurrences:
    """The recurrences over time inside the steps of a flow, each with the method of its steps.

    Args:
        flow: a traced forward pass.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._histories: Histories | None = None
        self._untold = ""

    def inside(self, start: int, stop: int) -> tuple[Recurrence, ...]:
        """Those between two states of the flow."""
        return self.of(scans_of(self._flow, start, stop, in_layers=True))

    def of(self, scans: Sequence[Scan]) -> tuple[Recurrence, ...]:
        """The readings of recurrences, all of those that run in their modules."""
        paths = [self._flow.recorded.path_of(scan.cycle[-1]) for scan in scans]
        found, scales = list[Recurrence](), list[Scan]()
        for i, (scan, path) in enumerate(zip(scans, paths, strict=True)):
            maximum = maximum_of(
                self._flow.recorded.graph, scan, [s for s, p in zip(scans, paths, strict=True) if p == path]
            )
            if maximum is not None:  # what is stored changes with its units
                found.append(self._rescaled(scan, maximum, path))
                scales.append(maximum)
                continue
            record = self._read(scan, path, paths[:i].count(path), paths.count(path))
            rates = growth_over(self._flow, scan)
            found.append(replace(record, growth=sum(rates) / len(rates)))
        packed = any(operation(node).startswith("PackPadded") for node in self._flow.recorded.graph.nodes)
        return tuple(
            replace(r, growth=None if s in scales else r.growth, notes=_counted(s, packed, r.notes))
            for s, r in zip(scans, found, strict=True)
        )

    def _rescaled(self, scan: Scan, maximum: Scan, path: str) -> Recurrence:
        """A recurrence that is stored in units of the exponential of a running maximum."""
        record = Recurrence(
            "linear recurrence (rescaled)", "x' = a x + u, stored in units of exp(m), m a running maximum", "measured",
            None, path, scan.n_steps, fed=True,
            notes=("what multiplies the stored state depends on the maximum, and is no number of the recurrence",),
        )  # fmt: skip
        around = _OverTime(over_scan(self._flow, scan, scan.middle, min(scan.middle + _TIMES, len(scan))))
        if not _is_affine(around, scan):
            return replace(record, name="unnamed (rescaled by a running maximum)", system="")
        coupled = [coupling(step.segment) for step in around.flow.steps]
        factors = [c.blocks[..., 0, 0] for c in coupled if c is not None and c.size == 1]
        graph = self._flow.recorded.graph
        own = without_maximum(graph, scan, maximum, factors) if len(factors) == len(coupled) else None
        if own is None:
            return record
        low, high = float(own.abs().min()), float(own.abs().max())
        return replace(
            record, name=f"linear recurrence ({_sizes(low, high)})", fed=False, low=low, high=high,
            system="x' = -lambda x + u, stored in units of exp(m), m a running maximum",
            notes=("the numbers are those without the maximum: they are the same at all times that were looked at",),
        )  # fmt: skip

    def convolved(self, start: int, stop: int) -> tuple[Recurrence, ...]:
        """Those between two states of the flow that made the kernels of convolutions by Fourier transforms."""
        recorded = self._flow.recorded
        nodes = recorded.graph.nodes[self._flow.states[start].position : self._flow.states[stop].position]
        paths = dict.fromkeys(recorded.path_of(node) for node in nodes if operation(node) == "FftC2R")
        found = []
        for path in paths:
            if (made := self._looked_back()) is None:
                break
            for powers in powers_of_kernels(made.graph, made.nodes_of(path), made.is_fed):
                sizes, h_a = powers.factors.abs(), rates("exponential", powers.factors.detach().cpu().numpy())
                low, high = float(sizes.min()), float(sizes.max())
                found.append(Recurrence(
                    f"{_CALLED['exponential'][0]}, {_sizes(low, high)})", _CALLED["exponential"][1], "measured",
                    powers.residual, path, powers.count, low, high,
                    notes=(_CONVOLVED, *filter(None, [h_a])),
                ))  # fmt: skip
        return tuple(found)

    def levers(self, scans: Sequence[Scan], place: int) -> list[tuple[str, float]]:
        """Parameters that set how long one of some recurrences remembers, see `Histories.levers`."""
        located = self._histories_at(scans, place)
        return [] if located is None else located[0].levers(*located[1])

    def makers(self, scans: Sequence[Scan], place: int) -> list[str]:
        """Parameters that the factor of one of some recurrences is made of."""
        located = self._histories_at(scans, place)
        return [] if located is None else located[0].makers(*located[1])

    def range_of_factor(self, scans: Sequence[Scan], place: int) -> tuple[float, float]:
        """The least and the largest real part of the factor of one of some recurrences; NaN where it is not known."""
        located = self._histories_at(scans, place)
        return (math.nan, math.nan) if located is None else located[0].range_of_factor(*located[1])

    def _histories_at(self, scans: Sequence[Scan], place: int) -> tuple[Histories, tuple[str, int, int]] | None:
        paths = [self._flow.recorded.path_of(scan.cycle[-1]) for scan in scans]
        at = paths[place], paths[:place].count(paths[place]), paths.count(paths[place])
        self._made(*at)
        return None if self._histories is None else (self._histories, at)

    def _read(self, scan: Scan, path: str, place: int, count: int) -> Recurrence:
        around = _OverTime(over_scan(self._flow, scan, scan.middle, min(scan.middle + 2, len(scan))))
        fed = _is_fed(around, scan)
        found = read(around, 0, 1)
        if is_maximum(scan) and found.name == "plain":
            return Recurrence("maximum over time", "x' = max(x + w, u)", "proven", None, path, scan.n_steps)
        # products with what the input makes of every time, k (v - k^T S), are no field but the matrix of that time
        proven = found.evidence == "proven" and not fed
        has_field = proven or len(scan.states[0]) > 1 or _multiplies_by_weights(around, scan)
        if not _is_affine(around, scan) or (found.method is not None and found.recorded and has_field):
            return _of_cell(around, found, scan, path, fed)
        coupled = coupling(around.flow.steps[0].segment)
        if coupled is None:
            return Recurrence(
                "linear recurrence (coupled)", "x' = A(u) x + B u", "measured", None, path, scan.n_steps, fed=fed,
                notes=("more than one axis of the state is coupled: its matrix was not taken apart",),
            )  # fmt: skip
        record = linear_recurrence(coupled, self._made(path, place, count), path, scan.n_steps,
                                   time=scan.before + scan.middle, taps=scan.taps, fed=fed)  # fmt: skip
        return replace(record, notes=(*record.notes, self._untold)) if self._untold else record

    def _made(self, path: str, place: int, count: int) -> Made:
        """How the factor of a recurrence was made; where that cannot be seen, why not is kept."""
        made = self._looked_back()
        return Made() if made is None else made.of(path, place, count)

    def _looked_back(self) -> Histories | None:
        """All that the numbers of the flow were made of; None where that cannot be seen."""
        if self._histories is None and not self._untold:
            if any(step.segment.recomputes for step in self._flow.steps):
                self._untold = "how the factor was made of its parameters was not looked at, to save memory"
            else:
                try:
                    self._histories = Histories(self._flow)
                except RuntimeError as error:
                    self._untold = f"the model does not run with parameters that require grad: {str(error)[:100]}"
        return self._histories


def _counted(scan: Scan, packed: bool, notes: tuple[str, ...]) -> tuple[str, ...]:
    """Notes that say what a step of a recurrence is where it is no time of every sequence."""
    if packed:
        return ("the sequences are packed: these are the steps that run with one number of samples", *notes)
    if scan.width == 1:
        return notes
    told = (note.replace("a time step", "a chunk").replace("at time", "at chunk") for note in notes)
    return (f"a step is a chunk, of {scan.width} times", *told)


class _OverTime(Surroundings):
    """A flow over time; what the inputs alone make is held fixed, and no part of a step."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow, checks=False)
        self.graph = self.graph.along(self.graph.nodes, self.graph.inputs)
        self.graph.recurrent = frozenset()  # a time step of a layer of torch is one like others

    def nodes(self, start: int, stop: int) -> list[Node]:
        """The operations on what depends on the state before."""
        known: set[Any] = set(self.flow.states[start].values)
        found = []
        for node in super().nodes(start, stop):
            if any(value in known or value.node in known for value in self.graph.inputs[node]):
                known.add(node)
                found.append(node)
        return found


def _of_state(around: _OverTime, scan: Scan) -> dict[Node, int]:
    """The operations of a time step on the way of the state, with how many of their inputs depend on it."""
    known: set[Any] = set(around.flow.states[0].values)
    found: dict[Node, int] = {}
    for node in around.nodes(0, 1):
        count = sum(value in known or value.node in known for value in around.graph.inputs[node])
        known.add(node)
        if node in scan.cycle:
            found[node] = count
    return found


def _is_affine(around: _OverTime, scan: Scan) -> bool:
    states = around.flow.states[0].values
    carried = _of_state(around, scan)

    def is_state(node: Node, place: int) -> bool:
        parent, output = node.next_functions[place]
        return parent in carried or (parent is not None and Value(parent, output) in states)

    def affine(node: Node, active: int) -> bool:
        if operation(node) == "Div":  # not in the divisor
            return active == 1 and is_state(node, 0)
        if operation(node) in PRODUCTS_ADDED and active == 2:  # S + a (v - S k) k^T at once: not in both factors
            return is_state(node, 0)
        return is_affine(node, active) or (operation(node) in _MIXTURES and active == 1)

    return all(affine(node, active) for node, active in carried.items())


def _multiplies_by_weights(around: _OverTime, scan: Scan) -> bool:
    """Whether the state passes a matrix or a kernel that is the same at all times."""
    inputs = around.graph.inputs
    return any(has_matrix(node) and len(inputs[node]) == active for node, active in _of_state(around, scan).items())


def _is_fed(around: _OverTime, scan: Scan) -> bool:
    """Whether numbers that are made of the input multiply the state or a field, so that they hold for this input."""
    inputs = around.graph.inputs
    return any(
        len(inputs[node]) > active and operation(node) not in MOVES | ADDS
        for node, active in _of_state(around, scan).items()
    )


def _of_cell(around: _OverTime, found: Identification, scan: Scan, path: str, fed: bool) -> Recurrence:
    """What the reader of steps made of a cell that is not affine, or has a field."""
    name, system, evidence, notes = found.name, found.system, found.evidence, found.notes
    if name == "unnamed":
        name = "unnamed (a system of several states)"
    if fed and evidence == "proven" and name not in _WITHOUT_NUMBERS:
        evidence = "measured"
        notes = ("numbers that are made of the input multiply the state: they are those of this input", *notes)
    return Recurrence(
        name, system, evidence, found.residual, path, scan.n_steps, fed=fed, method=found.method, notes=notes
    )


def linear_recurrence(
    coupled: Coupling,
    made: Made,
    path: str,
    n_steps: int,
    *,
    time: int,
    taps: int = 1,
    fed: bool,
    growth: float | None = None,
    notes: tuple[str, ...] = (),
) -> Recurrence:
    """The reading of a recurrence that is affine in its state.

    Args:
        coupled: its matrix at one time.
        made: how its factor was made.
        path: the module in which it runs.
        n_steps: how many times there are.
        time: that of the matrix.
        taps: successive times at which the input enters.
        fed: whether the input makes the matrix.
        growth: what a cotangent gains a step, nats.
        notes: what else was seen.
    """
    values = coupled.eigenvalues()
    sizes = np.abs(values)
    low, high = float(sizes.min()), float(sizes.max())
    told = [*notes, f"|eigenvalues| of a time step from {low:.4g} to {high:.4g}"]
    if fed:
        told.append(f"they depend on the input, and are those at time {time} of {n_steps}")
    evidence, residual = "measured", coupled.residual
    method: LinearStability | None = None
    if not fed and not made.rule and coupled.size > 1 and (rule := _rule_of_constants(coupled)):
        made = Made(rule)
        told.append("a constant matrix: under this rule alone few numbers make up its A")
    if made.rule:
        called, system = _CALLED[made.rule]
        if made.rule == "exponential" and taps > 1:
            called, system = "exponential trapezoid (two-point input", f"{system}, {_BOTH_ENDS}"
        name = f"{called}, {_sizes(low, high)})"
        residual = max(made.residual, residual)
        evidence = "proven" if made.certain and not fed else "measured"
        told += [*filter(None, [rates(made.rule, values)])]
        if made.weight in _WEIGHTS or made.input_follows is not None:
            told.append(_WEIGHTS.get(made.weight) or (_FOLLOWS if made.input_follows else _OWN))
        method = integrators.named(_METHODS[made.rule]) if made.rule in _METHODS else None
    elif made.explicit:
        size = _sizes(low, high) if coupled.size == 1 else f"a matrix, |eigenvalues| {low:.3g} to {high:.3g}"
        decay = made.explicit == "decay"
        name = f"{'decay and then ' * decay}forward Euler (linear, {size})"
        system = "x' = -gamma x and x' = A x + B u in turn, a Lie splitting" if decay else "x' = A x + B u"
        told.append(f"{_EXPLICIT}{', which the input makes' * made.fed}")
    elif coupled.size > 1:
        name, system = _of_blocks(coupled, low, high)
        if name.startswith(("symplectic Euler", "backward Euler")):
            told += [*filter(None, [rates_of_oscillators(_real_blocks(coupled))])]
    else:
        name, system = _of_numbers(values.ravel(), made, fed)
        constant = not fed and low == high and not np.iscomplex(values).any()
        evidence = "proven" if constant else "measured"
    if taps > 1:
        told.append(f"the input enters at {taps} successive times, each with a weight of its own")
    return Recurrence(
        name, system, evidence, residual, path, n_steps, low, high, growth, fed=fed, method=method, notes=tuple(told)
    )


def _real_blocks(coupled: Coupling) -> np.ndarray[Any, np.dtype[np.float64]]:
    blocks = coupled.blocks.real.reshape(-1, coupled.size, coupled.size)
    return np.asarray(torch.unique(blocks.double(), dim=0).numpy())


def _rule_of_constants(coupled: Coupling) -> str | None:
    """The rule by which one real matrix was made that is a constant of the code; None where there are several."""
    blocks = _real_blocks(coupled)
    spread = float(np.abs(blocks - blocks[:1]).max())
    same = not coupled.blocks.is_complex() and spread <= _CLOSE * float(np.abs(blocks).max())
    return rule_of_constants(blocks[0]) if same else None


def _range(low: float, high: float) -> str:
    ends = dict.fromkeys((f"{low:.3g}", f"{high:.3g}"))
    return " to ".join(ends)


def _sizes(low: float, high: float) -> str:
    """The moduli of the numbers that multiply the entries of a state."""
    return f"|a| = {low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"|a| from {low:.3g} to {high:.3g}"


def _of_numbers(a: np.ndarray[Any, Any], made: Made, fed: bool) -> tuple[str, str]:
    """The name where every entry of the state is multiplied by a number of its own."""
    mean = float(np.abs(a).mean())
    one = np.ptp(np.abs(a)) == 0.0 and not np.iscomplex(a).any()
    if one and a[0] == 1.0:
        return "sum over time (a = 1)", "x' = u"
    number = f"a = {a[0].real:.3g}" if one else _sizes(float(np.abs(a).min()), float(np.abs(a).max()))
    if made.convex and fed:
        return f"gated Euler (mean a = {mean:.3g})", "x' = z(u) (v(u) - x), or the exponential step exp(-tau) = 1 - z"
    if made.convex:
        return f"damped Euler ({number})", "x' = u - x, or the exponential step exp(-h) = a"
    rate = "lambda(u)" if fed else "lambda"
    return f"linear recurrence ({number})", f"x' = -{rate} x + u"


def _of_blocks(coupled: Coupling, low: float, high: float) -> tuple[str, str]:
    """The name where entries are coupled: oscillators by the invariants of all their blocks, else a matrix."""
    if coupled.size == 2 and not (coupled.blocks.is_complex() and bool(coupled.blocks.imag.any())):
        M = _real_blocks(coupled)
        trace, det = np.trace(M, axis1=1, axis2=2), np.linalg.det(M)
        turns = np.abs(trace) < 2 * np.sqrt(np.abs(det))
        drifts = (
            (trace == 2) & (np.eye(2) == M).any(axis=(1, 2)) & turns.any()
        )  # a spring of no stiffness beside others
        if (turns | drifts).all() and np.abs(det - 1).max() <= _CLOSE:
            kept = [np.abs(M[:, i, i] - 1).max() <= _CLOSE for i in range(2)]
            if any(kept):
                return "symplectic Euler (linear oscillator)", "y'' = -A y + B u, one of position and velocity first"
            return "linear oscillator that keeps its volume", "y'' = -A y + B u"
        # 1 / (1 - i w) has the real part 1 of its inverse: trace = 2 det, whatever the frequencies
        if turns.all() and np.abs(trace - 2 * det).max() <= _CLOSE and (det < 1).all():
            return "backward Euler (linear oscillator)", "y'' = -A y + B u, position and velocity at the new time"
        if turns.all():
            return f"linear oscillator (|eigenvalues| {_range(low, high)})", "y'' = -A y - g y' + B u"
    return f"linear recurrence (a matrix, |eigenvalues| {_range(low, high)})", "x' = A x + B u"
