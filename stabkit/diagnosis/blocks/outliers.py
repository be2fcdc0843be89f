"""Local faults: one block far from its peers, also where the growth over all blocks stays in range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from stabkit.diagnosis.blocks.behaviour import Behaviour, behaviours, jump
from stabkit.diagnosis.blocks.peers import Deviation
from stabkit.diagnosis.blocks.weight_faults import FEWEST_PEERS, WeightFault, bias_faults, rank_faults, weight_faults
from stabkit.diagnosis.blocks.weights import Weight
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.states.activity import Activity
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import factor, nats

_REFERENCE = "deviation from the median of the peers in units of their median absolute deviation (Hampel, 1974)"
_HIDDEN = math.log(4.0)  # size from which a weight is a warning although a norm hides it, nats
_NEAR = 2  # steps behind a fault whose oddities it explains: its activation and its norm


@dataclass(frozen=True)
class LocalFault:
    """One step at fault, with all that sets it apart.

    Attributes:
        step: index of the step.
        size: its deviation in nats, -inf for something that passes nothing.
        weights: its weights far from their peers, worst first.
        behaviour: how it acts beside its peers.
        hidden: whether the block acts like its peers all the same, since a norm takes the size out again.
        biases: biases far from their peers that explain it; they belong to the step ``home``.
        home: the step to be named: its own, or a shortly earlier one whose bias is at fault.
    """

    step: int
    size: float
    weights: tuple[WeightFault, ...]
    behaviour: Behaviour
    hidden: bool = False
    biases: tuple[Weight, ...] = ()
    home: int = -1

    @property
    def normed(self) -> bool:
        """Whether it is a norm that hides the size of the weights."""
        return self.hidden and any(found.weight.normed for found in self.weights)

    def branches(self, thresholds: Thresholds) -> list[tuple[str, float]]:
        """Where the branches at fault end, with the deviation of the gain of each."""
        pairs = zip(self.behaviour.step.merges, self.behaviour.branch, strict=True)
        return [
            (m.module_path, d.size) for m, d in pairs if d.exceeds(thresholds.outlier_behaviour, thresholds.outlier)
        ]


def local_findings(measurement: Measurement, thresholds: Thresholds) -> list[Finding]:
    """Findings about single blocks, worst first."""
    return [_finding(fault, measurement, thresholds) for fault in local_faults(measurement, thresholds)]


def local_faults(measurement: Measurement, thresholds: Thresholds) -> list[LocalFault]:
    """Blocks far from their peers: by a weight that shows in what the block does, or by two readings that agree."""
    acting = {b.step.index: b for b in behaviours(measurement)}
    heavy: dict[int, list[WeightFault]] = {}
    for found in weight_faults(measurement.steps, thresholds):
        if found.step in acting and not _belongs(found, measurement):
            heavy.setdefault(found.step, []).append(found)
    faults = []
    explained: set[int] = set()
    for step, weights in heavy.items():
        near = [i for i in range(step, min(step + 1 + _NEAR, len(measurement.steps))) if _odd(acting, i, thresholds)]
        explained.update((step, *near))
        fault = LocalFault(step, weights[0].deviation.size, tuple(weights), acting[step])
        faults.append(replace(fault, hidden=not _shows(fault, acting)))
    biased = bias_faults(measurement.steps, thresholds)
    for step, behaviour in acting.items():
        if step in explained or not _odd(acting, step, thresholds):
            continue
        home = next((i for i in range(step, step - 1 - _NEAR, -1) if i in biased), step)
        if home in biased:
            explained.update(range(home, home + 1 + _NEAR))
        biases = tuple(biased.get(home, ()))
        faults.append(LocalFault(step, behaviour.outlying(thresholds), (), behaviour, biases=biases, home=home))
    return sorted(faults, key=lambda f: (f.hidden, not f.weights, -abs(f.size)))


def _odd(acting: dict[int, Behaviour], index: int, thresholds: Thresholds) -> bool:
    return index in acting and (jump(acting[index]) or acting[index].outlying(thresholds) != 0.0)


def _belongs(found: WeightFault, measurement: Measurement) -> bool:
    """Whether the size of the weight has a good reason."""
    return _is_fresh_head(found, measurement) or _is_saner_end(found, measurement)


def _shows(fault: LocalFault, acting: dict[int, Behaviour]) -> bool:
    """Whether the weights show in what their block does, or in the activation and norm right behind it.

    A weight without peers of its role is the only one of its kind, and what its block does has no measure.
    """
    if all(found.alone for found in fault.weights):
        return True
    behind = range(fault.step, fault.step + 1 + _NEAR)
    return fault.behaviour.confirms() or any(i in acting and jump(acting[i]) for i in behind)


def _is_fresh_head(found: WeightFault, measurement: Measurement) -> bool:
    """A last layer of zeros, or of very small weights, is how a head is often made: training moves it first."""
    last = measurement.steps[-1]
    if found.step != last.index or last.kind != "transition":
        return False
    return found.deviation.value == -math.inf or (found.alone and found.deviation.size < 0)


def _is_saner_end(found: WeightFault, measurement: Measurement) -> bool:
    """A stem or head whose gain is nearer to 1 than that of the layers between is not the odd one."""
    at_end = found.step in (0, len(measurement.steps) - 1)
    return at_end and min(map(abs, found.weight.gains)) <= abs(found.deviation.typical)


def _finding(fault: LocalFault, measurement: Measurement, thresholds: Thresholds) -> Finding:
    step = fault.behaviour.step
    kind = _kind(fault)
    growth = measurement.growth[step.index]
    stopped = bool(np.isneginf(growth).all())
    severity = "critical" if stopped or abs(fault.size) > thresholds.explosion else "warning"
    if fault.hidden and not _counts(fault, thresholds):
        severity = "info"
    home = measurement.steps[fault.home] if fault.biases else step
    if fault.biases:
        remedy = remedies.lift(fault.biases)
    else:
        remedy = remedies.for_block(step, kind, fault.weights, fault.size, fault.branches(thresholds))
    numbers = _numbers(fault)
    return Finding(
        kind=kind,
        severity=severity,
        steps=tuple(sorted({home.index, fault.step})),
        module_path=home.home((*(found.weight for found in fault.weights), *fault.biases)),
        confidence=_confidence(fault),
        evidence=_evidence(fault, step),
        remedy=remedy.text,
        reference=_REFERENCE,
        numbers=numbers,
        actions=remedy.actions,
    )


def _counts(fault: LocalFault, thresholds: Thresholds) -> bool:
    """Whether a weight matters although its block acts like the others.

    Behind a norm its size still sets that of its gradient. Where no branch was measured, as in a gate or where a branch
    is still switched off, a size that no peer comes near counts. Elsewhere something else makes up for it.
    """
    if abs(fault.size) < _HIDDEN:
        return False
    if fault.normed:
        return True
    worst, measured = fault.weights[0].deviation, [d.value for d in fault.behaviour.branch if math.isfinite(d.value)]
    return not measured and worst.peers > FEWEST_PEERS and worst.exceeds(_HIDDEN, 2 * thresholds.outlier)


def _kind(fault: LocalFault) -> str:
    if fault.size == -math.inf:
        return "dead"
    if fault.normed:
        return "vanishing" if fault.size > 0 else "exploding"  # the gradient of the weight itself goes with 1 / size
    if jump(fault.behaviour):
        return "saturated" if fault.behaviour.saturation > fault.behaviour.dead else "dead"
    if fault.size < 0:
        return "vanishing"
    grows = fault.behaviour.gain.size > math.log(1.5) or not fault.behaviour.step.merges
    return "exploding" if grows else "unstable_step"


def _confidence(fault: LocalFault) -> float:
    """One minus the chance of such a deviation among peers, by Chebyshev's inequality for one-sided tails."""
    worst = fault.weights[0].deviation if fault.weights else fault.behaviour.gain
    if not math.isfinite(worst.size):
        return 1.0
    sigmas = abs(fault.size) / worst.spread if math.isfinite(worst.spread) else 6.0
    return float(sigmas**2 / (1 + sigmas**2))


def _numbers(fault: LocalFault) -> dict[str, float]:
    acting = fault.behaviour
    numbers = {"deviation": fault.size, "gain_deviation": acting.gain.size, "peers": float(acting.peers)}
    for index, branch in enumerate(acting.branch):
        numbers[f"branch_deviation_{index}"] = branch.size
    if acting.saturation:
        numbers["saturation_excess"] = acting.saturation
    if acting.dead:
        numbers["dead_excess"] = acting.dead
    for found in fault.weights:
        numbers[f"weight_deviation:{found.weight.path}"] = found.deviation.size
    return numbers


def _evidence(fault: LocalFault, step: StepMeasurement) -> str:
    parts = [_weight_text(found) for found in fault.weights[:3]]
    parts += [f"the entries of {b.path} have the mean {b.mean:+.3g}, far from those of its peers" for b in fault.biases]
    acting = fault.behaviour
    if fault.normed and math.isfinite(fault.size):
        parts.append(
            f"a norm hides this from the states, but the gradient of the weight is {factor(-fault.size)} times that of "
            f"its peers, and a step of the same rate {factor(-2 * fault.size)} times as large beside the weight"
        )
    if acting.peers:
        parts.append(_compared(acting.gain, acting.peers))
        parts += [
            _compared(branch, acting.peers, branch=merge.module_path or str(index))
            for index, (merge, branch) in enumerate(zip(step.merges, acting.branch, strict=True))
            if abs(branch.size) > 0.5
        ]
    if acting.saturation:
        parts.append(f"{acting.saturation:.0%} more of its activations are saturated than in its peers")
    if acting.dead:
        parts.append(f"{acting.dead:.0%} more of its units are dead than in its peers")
    parts += [_activity_text(a) for a in step.activities if a.saturated > 0.5 or a.dead > 0.5]
    return "; ".join(parts)


def _weight_text(found: WeightFault) -> str:
    if found.deviation.value == -math.inf:
        return f"{found.weight.path} is zero, and in {found.deviation.peers} peers it is not"
    ratio = factor(found.deviation.size)
    return f"{found.weight.path} is {ratio} times as large as in {found.deviation.peers} peers"


def _compared(found: Deviation, peers: int, branch: str = "") -> str:
    through = f" through its branch {branch}" if branch else ""
    what = f"the gain, 1/2 log(|J|_F^2 / m) of the m rows of the Jacobian{through},"
    passes = f"nothing passes{through}" if found.value == -math.inf else f"{what} is {nats(found.value)}"
    typical = f"{nats(found.typical)} (spread {found.spread:.2f})"
    return f"{passes}; in {peers} peers {'the gain' if found.value == -math.inf else 'it'} is {typical}"


def _activity_text(activity: Activity) -> str:
    if activity.dead > 0.5:
        return f"{activity.dead:.0%} of its {activity.units} {activity.operation} units pass nothing"
    return f"{activity.saturated:.0%} of its {activity.operation} outputs are saturated"


def rank_findings(measurement: Measurement, thresholds: Thresholds) -> list[Finding]:
    """Matrices of far lower effective rank than the same matrix of the other blocks, worst first."""
    return [_of_rank(fault, measurement) for fault in rank_faults(measurement.steps, thresholds)]


def _of_rank(fault: WeightFault, measurement: Measurement) -> Finding:
    step, weight, far = measurement.steps[fault.step], fault.weight, fault.deviation
    size = math.exp(weight.gains[0]) / weight.unit
    share, typical = math.exp(far.value), math.exp(far.typical)
    return Finding(
        kind="rank_collapse",
        severity="warning",
        steps=(fault.step,),
        module_path=step.home([weight]),
        confidence=1.0 - math.exp(2 * far.size),
        evidence=f"the effective rank of {weight.path} is {share:.2%} of the largest that its shape allows, in "
        f"{far.peers} peers {typical:.0%}: its block writes along few directions only",
        remedy=f"draw {weight.path} anew with standard deviation {size:.3g}, which it has now",
        reference="Roy and Vetterli, The effective rank, 2007; Bell and Dean, 1970 (participation ratio)",
        numbers={"rank_deviation": far.size, "share": share, "peers": float(far.peers)},
        actions=(remedies.redraw(weight.path, size),),
    )
