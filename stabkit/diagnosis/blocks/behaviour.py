"""Blocks that act unlike their peers: in gain, in what their branch adds, in what their activations let through."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from stabkit.diagnosis.blocks.peers import FLOOR, Deviation, Peers, nearest_to_peers
from stabkit.diagnosis.measurement import Array, Measurement, StepMeasurement
from stabkit.diagnosis.states.activity import Activity
from stabkit.diagnosis.thresholds import Thresholds

_FEWEST = 5  # peers: of fewer, one that differs says nothing of which is the odd one
_AGREE = 0.5  # share of a deviation that its other reading must confirm behind a norm
_JUMP = 0.3  # by how much the share of saturated entries or dead units may exceed that of the peers
_FEW_UNITS = 12  # units under which a share of dead ones is mostly chance
_NOTICED = 0.35  # nats from which a deviation confirms that a weight's size matters


@dataclass(frozen=True)
class Behaviour:
    """What sets one step apart from its peers.

    Attributes:
        step: the step.
        gain: the gain of the Jacobian of the step, nats.
        change: the change of the size of the state over the step, nats.
        branch: gains of its branches, in order. A branch behind a norm passes gradients on by one over the size of
            the state, so gains are held against those of the peers as they are and times that size: what agrees best
            among the peers counts.
        added: what it adds, as it is or beside the state, whichever agrees best among the peers.
        saturation: by how much the share of saturated entries exceeds that of the peers.
        dead: by how much the share of dead units exceeds that of the peers.
        neighbours: smallest deviation of each branch gain from the two nearest blocks; 0 without two.
        peers: how many there are.
        at_end: whether it is the first or the last of its kind, which is given, or gives to, something else than the
            rest: the gain of a branch beside a skip is then no sign of a fault.
        at_start: whether it is the first of its kind.
        alike: whether they act between the same spaces, so that a deviation alone means something.
    """

    step: StepMeasurement
    gain: Deviation
    change: Deviation
    branch: tuple[Deviation, ...] = ()
    added: Deviation | None = None
    saturation: float = 0.0
    dead: float = 0.0
    neighbours: tuple[float, ...] = field(default=())
    peers: int = 0
    at_end: bool = False
    at_start: bool = False
    alike: bool = True

    @property
    def largest(self) -> float:
        """The largest deviation of any kind, nats; -inf where something passes nothing."""
        sizes = [d.size for d in (self.gain, self.change, *self.branch, self.added) if d]
        return max((s for s in sizes if not math.isnan(s)), key=abs, default=0.0)

    def confirms(self) -> bool:
        """Whether the step acts unlike its peers at all; True where there are none to compare with."""
        return self.peers < _FEWEST or abs(self.largest) > _NOTICED or max(self.saturation, self.dead) > _JUMP / 2

    def outlying(self, thresholds: Thresholds) -> float:
        """How far the step lies from its peers where two independent readings agree, nats; 0 if they do not."""
        if self.peers < _FEWEST or not self.alike:
            return 0.0
        limit, sigmas = thresholds.outlier_behaviour, thresholds.outlier
        found = [0.0]
        odd = max(abs(self.gain.value), abs(self.change.value)) > abs(self.gain.typical)
        if not self.step.renormalised and odd and not (self.at_end and self.step.merges):
            found.append(_agreed(self.gain, self.change, limit, sigmas))  # unless its peers are the odd ones
        for index, branch in enumerate(self.branch):
            if self.added is not None and len(self.branch) == 1:
                found.append(_agreed(branch, self.added, limit, sigmas))
            near = self.neighbours[index] if index < len(self.neighbours) else 0.0
            if branch.exceeds(limit, sigmas) and abs(near) > limit and near * branch.size > 0:
                found.append(_smaller_size(branch.size, near))
        far = max(found, key=abs, default=0.0)
        # the source of the first is in units of its own, which its norm takes away
        return 0.0 if self.at_start and 0.0 < far < self.step.owed + limit else far


def _agreed(one: Deviation, two: Deviation, limit: float, sigmas: float) -> float:
    if one.exceeds(limit, sigmas) and two.exceeds(limit, sigmas) and one.size * two.size > 0:
        return _smaller_size(one.size, two.size)
    return 0.0


def _smaller_size(one: float, two: float) -> float:
    return one if abs(one) < abs(two) else two


def behaviours(measurement: Measurement) -> list[Behaviour]:
    """Every step beside its peers: the same module class between the same spaces, or else just of the same class."""
    steps = [step for step in measurement.steps if step.finite]
    sizes = [float(row.mean()) for row in measurement.log_states]
    members: defaultdict[tuple[object, ...], list[StepMeasurement]] = defaultdict(list)
    for step in steps:
        members[step.module_class, step.kind, step.space].append(step)
        members[step.module_class, step.kind].append(step)
    groups = {key: _Group(group, sizes) for key, group in members.items()}
    users: defaultdict[str, set[int]] = defaultdict(set)
    for step in steps:
        for weight in step.weights:
            users[weight.path].add(step.index)
    found = []
    for step in steps:
        narrow = groups[step.module_class, step.kind, step.space]
        group = narrow if len(narrow.steps) > _FEWEST else groups[step.module_class, step.kind]
        # a layer that runs again and again is no peer of itself
        same = set[int]().union(*(users[weight.path] for weight in step.weights)) - {step.index}
        if not step.module_class:
            group = _Group([step], sizes)
        elif same:
            group = _Group([other for other in group.steps if other.index not in same], sizes)
        found.append(_beside(step, group))
    return found


class _Group:
    """Steps that are peers, and what of them was compared: each reading is put in order once, for all steps.

    Args:
        steps: they.
        sizes: log of the rms of every state of the flow.
    """

    def __init__(self, steps: Sequence[StepMeasurement], sizes: Sequence[float]) -> None:
        self.steps = steps
        self.places = {step.index: place for place, step in enumerate(steps)}
        self.of_one_space = len({step.space for step in steps}) == 1
        self._sizes = sizes
        self._kept: dict[tuple[object, ...], Peers] = {}
        self._branches: dict[int, tuple[dict[int, int], list[list[Array]]]] = {}
        self._active: dict[int, tuple[dict[int, int], list[StepMeasurement]]] = {}

    def beside(self, step: StepMeasurement, what: str, read: Callable[[StepMeasurement], float]) -> Deviation:
        """A step beside all others by a reading with a name."""
        return self._peers((what,), lambda: [read(other) for other in self.steps]).deviation(self.places[step.index])

    def added(self, step: StepMeasurement) -> Deviation:
        """What a step adds, as it is or beside the state, whichever agrees best among the peers."""
        return nearest_to_peers(
            [
                self.beside(step, "branch", lambda s: s.log_branch),
                self.beside(step, "branch beside the state", lambda s: s.log_branch - self._sizes[s.index]),
            ]
        )

    def branches(self, step: StepMeasurement) -> list[tuple[Deviation, float]]:
        """The deviation of each branch gain from those with as many, and from the two nearest of these.

        Gains are read as they are and times the size of the state, as behind a norm; see `Behaviour`. Behind a norm a
        gain is held to be odd only if the other reading says half of it at least.
        """
        count = len(step.merges)
        if count not in self._branches:
            alike = [other for other in self.steps if len(other.merges) == count]
            before = np.array([self._sizes[other.index] for other in alike])
            gains = np.array([[merge.gain for merge in other.merges] for other in alike]).reshape(len(alike), -1)
            with np.errstate(invalid="ignore"):
                columns = [[column, column + before] for column in gains.T]
            self._branches[count] = {other.index: place for place, other in enumerate(alike)}, columns
        places, columns = self._branches[count]
        at, found = places[step.index], []
        for number, readings in enumerate(columns):
            kept = [self._peers((count, number, which), values.tolist) for which, values in enumerate(readings)]
            far = [peers.deviation(at) for peers in kept]
            best = nearest_to_peers(far)
            other = far[1 - far.index(best)]
            if step.norms > 0 and best.size * other.size < _AGREE * best.size**2:
                best = min(far, key=_size)
            found.append((best, _between(readings[far.index(best)], at)))
        return found

    def excess(self, step: StepMeasurement, what: str, share: Callable[[Activity], float]) -> float:
        """By how much a share of an activation of a step exceeds that of the same one of its peers, if clearly."""
        count, excess = len(step.activities), 0.0
        if count not in self._active:
            alike = [other for other in self.steps if len(other.activities) == count]
            self._active[count] = {other.index: place for place, other in enumerate(alike)}, alike
        places, alike = self._active[count]
        for position in range(count if len(alike) > _FEWEST else 0):
            peers = self._peers((what, count, position), lambda p=position: [share(s.activities[p]) for s in alike])  # type: ignore[misc]
            far = peers.deviation(places[step.index])
            spread = 0.0 if far.spread <= FLOOR else far.spread  # shares of entries need no floor of nats
            excess = max(excess, far.size if far.size > 6 * spread else 0.0)
        return excess

    def _peers(self, key: tuple[object, ...], values: Callable[[], list[float]]) -> Peers:
        if key not in self._kept:
            self._kept[key] = Peers(values())
        return self._kept[key]


def _beside(step: StepMeasurement, group: _Group) -> Behaviour:
    """A step beside its peers."""
    place, last = group.places[step.index], len(group.steps) - 1
    branches = group.branches(step)
    return Behaviour(
        step=step,
        gain=group.beside(step, "gain", lambda s: s.mean_gain),
        change=group.beside(step, "change", lambda s: s.log_change),
        branch=tuple(far for far, _ in branches),
        added=group.added(step) if step.merges and step.kind == "step" else None,
        saturation=group.excess(step, "saturated", lambda a: 0.0 if a.gate else a.saturated),
        dead=group.excess(step, "dead", _dead_beyond_chance),
        neighbours=tuple(near for _, near in branches),
        peers=last,
        at_end=place in (0, last),
        at_start=place == 0,
        alike=group.of_one_space,
    )


def _size(found: Deviation) -> float:
    return math.inf if math.isnan(found.size) else abs(found.size)


def _between(column: Array, at: int) -> float:
    """The smaller of the differences to the two nearest blocks, when they have one sign; 0 otherwise."""
    last = len(column) - 1
    if last < 2:
        return 0.0
    near = (1, 2) if at == 0 else (last - 1, last - 2) if at == last else (at - 1, at + 1)
    with np.errstate(invalid="ignore"):
        one, two = (float(column[at] - column[other]) for other in near)
    return _smaller_size(one, two) if one * two > 0 else 0.0


def _dead_beyond_chance(activity: Activity) -> float:
    """The share of dead units beyond the half that is always inactive where all inputs look alike to the layer."""
    return max(0.0, activity.dead - 0.5) if activity.units >= _FEW_UNITS else 0.0


def jump(behaviour: Behaviour) -> bool:
    """Whether far more of a step's units are saturated or dead than of its peers'."""
    return max(behaviour.saturation, behaviour.dead) > _JUMP
