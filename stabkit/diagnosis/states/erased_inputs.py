"""Normalisations over one value, or two: whatever they are given, they return the same."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from stabkit.diagnosis.finding import Action, Finding
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.states.attention import weighs
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.tracing.products.node_derivatives import signed
from stabkit.vocabulary import moves

_SIGNS = 2  # values of which only the sign of their difference is left
_ENOUGH = 8  # values whose mean and variance leave most of what they were
_MOVES = moves("reshape", "permute", "copy", "expand")
_SOFTMAXES = frozenset({"Softmax", "LogSoftmax", "SafeSoftmax"})


@dataclass(frozen=True)
class Erasing:
    """One normalisation over too few values.

    Attributes:
        step: in which it runs.
        path: the module that it runs in.
        module: that module.
        values: how many values it normalises together.
        over: what holds these values: ``"group"``, ``"position"``, ``"channel"`` or ``"row"``.
        beside: whether what it is given is read beside it as well, as by a skip: then nothing before it is cut off, and
            only the branch behind it is the same for all.
    """

    step: int
    path: str
    module: nn.Module
    values: int
    over: str
    beside: bool = False


def erasing(flow: Flow) -> list[Erasing]:
    """The normalisations of a flow that take mean and variance, or a softmax, of one or two values, once a module."""
    modules = dict(flow.model.named_modules())
    recording = flow.recorded.recording
    found: dict[str, Erasing] = {}
    readers: dict[Value, list[int]] = {}
    for run, values, over, time in _counted(flow):
        path = recording.path_at(time)
        module = modules.get(path)
        # two values keep their ratio where no mean is taken away, and a softmax of two scores is a sigmoid
        most = 1 if over == "row" or isinstance(module, nn.RMSNorm) else _SIGNS
        if module is None or path in found or values > most:
            continue
        if over == "channel" and not isinstance(module, _InstanceNorm):
            continue  # the values of a batch norm are those of the batch, which says nothing of the network
        step = next((s.index for s in flow.steps if run.start < s.target.position), len(flow.steps) - 1)
        readers = readers or _readers(flow)
        found[path] = Erasing(step, path, module, values, over, _is_read_beside(flow, run, readers))
    return list(found.values())


def _readers(flow: Flow) -> dict[Value, list[int]]:
    """Where each value is taken, as positions of the operations."""
    graph = flow.recorded.graph
    found: dict[Value, list[int]] = {}
    for position, node in enumerate(graph.nodes):
        for value in set(graph.inputs[node]):
            found.setdefault(value, []).append(position)
    return found


def _is_read_beside(flow: Flow, run: range, readers: Mapping[Value, list[int]]) -> bool:
    """Whether what a normalisation is given, or what that is a view of, is taken by something else too."""
    graph = flow.recorded.graph
    inside: Container[int] = run
    node = graph.nodes[run.start]
    while graph.inputs.get(node):
        value = graph.inputs[node][0]
        if any(position not in inside for position in readers[value]):
            return True
        node = value.node
        if operation(node) not in _MOVES or node not in graph.rank:
            return False
        inside = (graph.rank[node],)
    return False


def _counted(flow: Flow) -> Iterator[tuple[range, int, str, int]]:
    """Positions, values and what holds them of every normalisation, and when it ran."""
    graph = flow.recorded.graph
    for position, node in enumerate(graph.nodes):
        values, over = _values(node)
        if values and not (over == "row" and weighs(flow, node)):  # attention to a single key is right as it is
            yield range(position, position + 1), values, over, node._sequence_nr()
    for call in flow.recorded.recording.calls:  # torch has no single operation for this one
        if isinstance(call.module, nn.RMSNorm):
            run = range(graph.position(call.start), graph.position(call.stop))
            if run:
                yield run, math.prod(call.module.normalized_shape), "position", call.start


def _values(node: Any) -> tuple[int, str]:
    """How many values a node normalises together, and what holds them; none for other operations."""
    name = operation(node)
    if name == "NativeGroupNorm":
        return int(node._saved_C) // int(node._saved_group) * int(node._saved_HxW), "group"
    if name == "NativeLayerNorm":
        return math.prod(node._saved_normalized_shape), "position"
    shape = meta_of(Value(node, 0)).shape
    if name == "NativeBatchNorm" and node._saved_training:
        return math.prod(shape) // shape[1], "channel"
    if name in _SOFTMAXES and shape:
        return int(shape[signed([node._saved_dim])[0]]), "row"
    return 0, ""


def erased_input_findings(flow: Flow, measurement: Measurement, thresholds: Thresholds) -> list[Finding]:
    """Normalisations that erase what they are given, as one finding; a softmax where nothing carries on beside it."""
    growth = measurement.growth.mean(axis=1)
    every = [(each, bool(growth[each.step] < -thresholds.explosion)) for each in erasing(flow)]
    found = [(each, alone) for each, alone in every if alone or each.over != "row"]
    if not found:
        return []
    worst = min((each for each, _ in found), key=lambda each: (each.beside, each.values))
    others = [each.path for each, _ in found if each is not worst]
    also = f"; so {'does' if len(others) == 1 else 'do'} {', '.join(others[:3])}" if others else ""
    also += f" and {len(others) - 3} more" if len(others) > 3 else ""
    words, _ = _cure(worst)
    harmless = all(each.beside for each, _ in found)
    return [
        Finding(
            kind="rank_collapse",
            severity="critical" if any(alone for _, alone in found) else "info" if harmless else "warning",
            steps=tuple(sorted({each.step for each, _ in found})),
            module_path=worst.path,
            confidence=1.0,
            evidence=_evidence(worst) + also + "; what they are given is carried on beside them" * harmless,
            remedy=words,
            reference="Wu and He, Group normalization, ECCV 2018; pytorch issue 19250",
            numbers={"values": float(worst.values), "modules": float(len(found))},
            actions=tuple(action for each, _ in found for action in _cure(each)[1]),
        )
    ]


def _evidence(found: Erasing) -> str:
    name = f"{found.path} ({_called(found.module)})" if found.path else _called(found.module)
    if found.over == "row":
        return f"{name} takes a softmax of one score, which is 1 whatever that is: no gradient gets back through it"
    if found.values > 1:
        return (
            f"{name} normalises over two values per {found.over}: all that is left of them is which is larger, and "
            "hardly any gradient gets back through it"
        )
    left = "the sign alone" if isinstance(found.module, nn.RMSNorm) else "its bias, the same for every sample"
    return f"{name} normalises over one value per {found.over}: it returns {left}, and no gradient gets back through it"


def _called(module: nn.Module) -> str:
    if isinstance(module, nn.GroupNorm):
        return f"GroupNorm({module.num_groups}, {module.num_channels})"
    return type(module).__name__


def _cure(found: Erasing) -> tuple[str, tuple[Action, ...]]:
    """What would leave something of the input, in words and as data."""
    module, path = found.module, found.path
    out = (remedies.activate(path, "Identity"),) if path and not any(True for _ in module.children()) else ()
    if found.over == "row":
        text = f"use a sigmoid in the place of the softmax at {path or 'the end'}, or give it a score per class"
        return text, (remedies.activate(path, "Sigmoid"),) if isinstance(module, nn.Softmax) else ()
    if not isinstance(module, nn.GroupNorm):
        return f"take {path or 'the norm'} out, or let it normalise over more values", out
    groups = _groups(module, found.values)
    if groups == module.num_groups:
        return f"take {path} out: there is nothing more to normalise over", out
    text = (
        f"normalise over more values: GroupNorm({groups}, {module.num_channels}) at {path}, "
        f"{found.values * module.num_groups // groups} values per group; or a LayerNorm, or no norm there"
    )
    return text, (remedies.set_option(path, "num_groups", groups),)


def _groups(norm: nn.GroupNorm, values: int) -> int:
    """The most groups that hold eight values each, or one."""
    total = values * norm.num_groups
    fits = [n for n in range(1, norm.num_groups + 1) if norm.num_channels % n == 0 and total // n >= _ENOUGH]
    return max(fits, default=1)
