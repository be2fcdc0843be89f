"""Inputs that are the same at every node, position or sample, of which the loss asks different answers.

Nodes of a graph that all have the same features, a decoder that is given zeros and no positions, a reader of data that
returns one item again and again: what is the same goes the same way through the model, whatever its weights are. Nodes
with the same features differ by their neighbours alone. Numbers drawn at random, the same for every sample, take the
place of such an input on trial, and decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LEARNT, Finding
from stabkit.diagnosis.inputs.features import changed
from stabkit.diagnosis.remedies.applying import is_small
from stabkit.diagnosis.remedies.learning import left_by_a_constant
from stabkit.diagnosis.remedies.moved_weights import moved_weights
from stabkit.diagnosis.remedies.usual_training import ADAM, adams, left_after
from stabkit.diagnosis.states.sample_meetings import differing
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated

_NEARLY = 0.01  # of the mean, that a feature varies by: then the bias of the first layer is worth a hundred spreads
_FEWEST = 4  # rows: what two or three have in common may be so by chance
_STEPS, _LARGE_STEPS = 200, 50  # of Adam, of small models and others: what tells rows apart is learnt by heart in them
# of the loss as it is after these steps: where rows were alike .00 to .48 is left so, and what is left as it is was
# left after a quarter of the steps already
_BETTER = 0.5
_LEARNT = 0.5  # of what one answer for all leaves of the loss, below which the structure of the data tells enough
_GRAPHS = "Xu, Hu, Leskovec and Jegelka, How powerful are graph neural networks?, 2019; Sato et al., 2021"
_POSITIONS = "Vaswani et al., Attention is all you need, 2017, section 3.5"


@dataclass(frozen=True)
class _Alike:
    """An input that is constant along one of its axes, which the output has as well."""

    name: str
    tensor: Tensor
    axis: int
    spread: float = 0.0  # beside the mean, of the feature that varies most

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self.tensor.shape[self.axis])

    def apart(self, tensor: Tensor) -> Tensor:
        """In the place of this input, numbers that tell its rows apart, the same for all samples.

        Those are its own, standardised, where they are only nearly the same.
        """
        if tensor is not self.tensor:
            return tensor
        if self.spread:
            return (tensor - tensor.mean(0)) / tensor.std(0).clamp_min(torch.finfo(tensor.dtype).tiny)
        shape = [n if i >= self.axis else 1 for i, n in enumerate(tensor.shape)]
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return drawn.to(tensor).expand_as(tensor)


def alike_row_findings(run: TrainingRun) -> list[Finding]:
    """A finding where rows that a model cannot tell apart are to be answered differently."""
    first = math.nan if run.done.loss is None else float(run.done.loss.detach())
    if not first > 0:
        return []
    for alike in _candidates(run):
        other = changed(run.call, alike.apart)
        if alike.axis and not _cannot_tell(run, alike):
            continue
        updates = adams(first)
        steps = _STEPS if is_small(run.call.module) else _LARGE_STEPS
        plain = left_after(run.call, run.loss, updates, steps=steps)
        apart = left_after(other, run.loss, updates, steps=steps)
        floor = left_by_a_constant(run.loss, run.done.output)
        if plain is None or apart is None or (floor is not None and plain * first < _LEARNT * floor):
            continue
        if apart < _BETTER * plain:
            left = f"{steps} steps of {ADAM} leave {plain:.2g} of the loss as it is"
            return [_finding(run, alike, left, plain, apart)]
    return []


def _candidates(run: TrainingRun) -> list[_Alike]:
    outputs = [t for _, t in named_tensors(run.done.output) if t.is_floating_point() and t.dim()]
    floats = [(path, t) for path, t in run.call.given if _is_of_features(t)]
    found = []
    for path, tensor in floats:
        for axis in range(tensor.dim() - 1):
            count = tensor.shape[axis]
            if count < _FEWEST or not any(o.dim() > axis and o.shape[axis] == count for o in outputs):
                continue
            if axis and tensor.shape[:axis] != outputs[0].shape[:axis]:
                continue
            same = bool((tensor == tensor.narrow(axis, 0, 1)).all())
            if same and (axis or _is_all_there_is(run, tensor)):
                found.append(_Alike(path, tensor, axis))
                break
            nodes = axis == 0 and run.flow.batch == 1  # of samples that do not meet feature scales speak
            if nodes and 0 < (spread := _spread(tensor)) < _NEARLY:
                found.append(_Alike(path, tensor, axis, spread))
                break
    return found


def _spread(tensor: Tensor) -> float:
    """The largest standard deviation of a feature, beside the size of its mean."""
    values = tensor.detach().double().flatten(1)
    return float((values.std(0) / values.mean(0).abs().clamp_min(1e-300)).max())


def _is_of_features(tensor: Tensor) -> bool:
    """Whether an input holds features of rows: no mask of (samples, positions), no square matrix of edges."""
    floats = tensor.is_floating_point() and tensor.layout == torch.strided and tensor.dim() > 1
    return floats and tensor.numel() > 0 and (tensor.dim() > 2 or tensor.shape[0] != tensor.shape[1])


def _is_all_there_is(run: TrainingRun, tensor: Tensor) -> bool:
    """Whether no other input tells samples apart; nodes of a graph, which meet, have their neighbours besides."""
    if run.flow.batch == 1:
        return True
    others = [t for _, t in run.call.given if t is not tensor and t.dim() and len(t) == len(tensor)]
    return not any(bool((t != t[:1]).any()) for t in others)


def _cannot_tell(run: TrainingRun, alike: _Alike) -> bool:
    """Whether outputs are the same along the axis with other weights, too."""
    try:
        with moved_weights(run.call.module):
            output = evaluated(run.call).output
    except StabkitError:
        return False
    made = [t.detach() for _, t in named_tensors(output) if t.is_floating_point() and t.dim() > alike.axis]
    rows = [t for t in made if t.shape[alike.axis] == alike.count]
    return bool(rows) and not any(
        bool(differing(t, t.narrow(alike.axis, 0, 1).expand_as(t).contiguous()).any()) for t in rows
    )


def _finding(run: TrainingRun, alike: _Alike, left: str, plain: float, apart: float) -> Finding:
    nodes = alike.axis == 0 and run.flow.batch == 1
    what = "nodes" if nodes else "positions" if alike.axis else "samples"
    trial = f"tried on a copy: {left}, and {apart:.2g} of it with numbers drawn at random for each of them in its place"
    if alike.spread:
        told = f"but for {alike.spread:.1g} of its mean, beside which the first layer hardly sees what varies"
        trial = f"tried on a copy: {left}, and {apart:.2g} of it with every feature standardised"
        remedy = "standardise every feature over the nodes: (x - mean) / std"
    elif nodes:
        told = "so that nothing but their edges tells them apart"
        remedy = (
            "give nodes features that tell them apart: what is known of them, their degree, eigenvectors of the "
            "Laplacian, random numbers, or an nn.Embedding with a row for each node"
        )
    elif alike.axis:
        told = "and the model returns the same for all of them, whatever its weights are"
        remedy = (
            "add positions (an embedding or sines of the position) to it, or give a decoder the targets, shifted by one"
        )
    else:
        told = "so that one answer is all that can be learnt"
        remedy = "look at what reads the data: it returns the same item again and again"
    return Finding(
        kind="input_scale",
        severity="warning",
        steps=(0,),
        module_path=run.flow.steps[0].module_path,
        confidence=1.0,
        evidence=f"the input {alike.name!r} is the same at all {alike.count} {what} (axis {alike.axis} of "
        f"{tuple(alike.tensor.shape)}), {told}, while the loss asks for different answers; {trial}",
        remedy=remedy,
        reference=_POSITIONS if alike.axis else _GRAPHS,
        numbers={"rows": float(alike.count), "left": plain, "treated": apart, LEARNT: apart / plain},
    )
