"""Blocks that lack the norm or the skip that all other blocks of their stack have."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable

from torch import nn

from stabkit.diagnosis.blocks.behaviour import Behaviour, behaviours
from stabkit.diagnosis.blocks.peers import FLOOR
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.identification.form.operations import has_matrix
from stabkit.tracing import Flow, FlowLike
from stabkit.vocabulary import norm_of

_FEWEST = 3  # peers that must agree
_MANY = 5  # peers from which what all of them have is no chance
_NOTICED = 0.1  # nats by which a block's gain must differ from fewer peers for a norm to be missed


def missing_norm_findings(flow: FlowLike, measurement: Measurement) -> list[Finding]:
    """Blocks that run fewer norms than all their peers, which run equally many, and as many matrices."""
    if not isinstance(flow, Flow):
        return []
    short = _short_of(flow, measurement, lambda step: step.norms, lambda step: (step.kind,))
    acting = _acting(measurement) if short else {}
    return [_norm_finding(flow, step, acting.get(step.index), missing) for step, missing in short]


def missing_skip_findings(flow: FlowLike, measurement: Measurement) -> list[Finding]:
    """Blocks that add fewer branches to a skip than all their peers in the same space, with as many matrices."""
    if not isinstance(flow, Flow):
        return []
    short = _short_of(flow, measurement, lambda step: len(step.merges), lambda step: (step.kind, step.space))
    acting = _acting(measurement) if short else {}
    return [_skip_finding(step, acting.get(step.index), missing) for step, missing in short if step.kind == "step"]


def _acting(measurement: Measurement) -> dict[int, Behaviour]:
    return {behaviour.step.index: behaviour for behaviour in behaviours(measurement)}


def _short_of(
    flow: Flow,
    measurement: Measurement,
    count: Callable[[StepMeasurement], int],
    group: Callable[[StepMeasurement], tuple[object, ...]],
) -> list[tuple[StepMeasurement, int]]:
    """Steps of which something is counted less often than in each of their peers, which agree; and how much less."""
    groups: defaultdict[tuple[object, ...], list[StepMeasurement]] = defaultdict(list)
    # a single layer holds no norm, so only modules of several parts are compared
    composed = {path for path, module in flow.model.named_modules() if any(True for _ in module.children())}
    for step, measured in zip(flow.steps, measurement.steps, strict=True):
        if step.module_path in composed and measured.module_class:
            matrices = sum(has_matrix(node) for node in step.segment.nodes)
            groups[measured.module_class, matrices, group(measured)].append(measured)
    found = []
    for members in groups.values():
        counts = Counter(map(count, members))
        for measured in members if len(members) > _FEWEST and len(counts) == 2 else []:
            (usual,) = counts.keys() - {count(measured)}
            if counts[count(measured)] == 1 and count(measured) < usual:
                found.append((measured, usual - count(measured)))
    return found


def _skip_finding(step: StepMeasurement, acting: Behaviour | None, missing: int) -> Finding:
    gain = acting.gain.size if acting is not None else 0.0
    bare = not step.merges and step.module_path
    return Finding(
        kind="exploding" if gain > FLOOR else "vanishing",
        severity="warning",
        steps=(step.index,),
        module_path=step.module_path,
        confidence=1.0,
        evidence=f"{step.module_path or step.name} adds {missing} branch{'es' if missing > 1 else ''} less to a skip "
        f"than each of its peers; its gain deviates from theirs by {gain:+.2f} nats",
        remedy="give it the skip that its peers have: x + f(x)",
        reference="He et al., ECCV 2016",
        numbers={"missing": float(missing), "gain_deviation": gain},
        actions=(remedies.add_skip(step.module_path),) if bare else (),
    )


def _norm_finding(flow: Flow, step: StepMeasurement, acting: Behaviour | None, missing: int) -> Finding:
    gain = acting.gain.size if acting is not None else 0.0
    places = _empty_places(flow, step.module_path)
    noticed = acting is None or acting.peers >= _MANY or abs(gain) > _NOTICED
    remedy = "put the norm that its peers have in front of its branch" + (
        f": at {', '.join(place for place, _ in places)}, as at {places[0][1]}" if places else ""
    )
    return Finding(
        kind="vanishing" if acting is not None and acting.largest < 0 else "exploding",
        severity="warning" if noticed else "info",
        steps=(step.index,),
        module_path=step.module_path,
        confidence=1.0,
        evidence=f"{step.module_path or step.name} runs {missing} norm{'s' if missing > 1 else ''} less than each of "
        f"its peers; its gain deviates from theirs by {gain:+.2f} nats, what it adds or passes by "
        f"{acting.largest if acting is not None else 0.0:+.2f}",
        remedy=remedy,
        reference="Xiong et al., ICML 2020",
        numbers={"missing": float(missing), "gain_deviation": gain},
        actions=tuple(remedies.insert_norm(place, like) for place, like in places),
    )


def _empty_places(flow: Flow, block: str) -> list[tuple[str, str]]:
    """Modules of a block that do nothing where those of its peers, by the same name, are norms."""
    modules = dict(flow.model.named_modules())

    def role(path: str) -> str:
        return re.sub(r"\d+", "*", path)

    norms = {role(path): path for path, module in modules.items() if norm_of(module)}
    inside = [path for path in modules if path.startswith(f"{block}.")]
    return [
        (path, norms[role(path)]) for path in inside if isinstance(modules[path], nn.Identity) and role(path) in norms
    ]
