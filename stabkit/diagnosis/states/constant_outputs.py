"""Outputs that a self-supervised loss has made the same for all samples.

A loss that only asks that two views of a sample give the same output is least where all samples do. So the outputs are
put at their means over the batch: where they nearly are there, the loss is as low, and its gradient leads nowhere, the
network has learnt a constant. A loss that holds outputs against targets pushes every sample another way, a network
that is not trained yet is pushed as well, and a loss that holds samples apart is larger there. What is near is held
against the loss of outputs drawn at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.states.collapse import dispersion
from stabkit.errors import TraceError
from stabkit.tracing import Flow
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.inputs import differentiable

_ALIKE = 0.01  # share of the energy of an output that tells samples apart, under which they are alike
_FALL = 10.0  # factor by which the inputs tell samples apart better
_APART = 0.1  # share of the slope at the means by which samples may be pushed apart
_NEAR = 0.05  # share of the way from the loss at the means to that of random outputs


def constant_output_findings(flow: Flow, loss: object) -> list[Finding]:
    """One finding where all outputs of a model that has several have become constants, and its loss asks for it."""
    outputs = {id(tensor): tensor for _, tensor in named_tensors(flow.output) if differentiable(tensor)}
    held = [tensor.detach() for tensor in outputs.values()]
    if loss is None or len(held) < 2 or any(t.dim() < 2 or len(t) < 3 for t in held):
        return []
    before, after = dispersion(flow.states[0].tensors[0]), max(dispersion(tensor) for tensor in held)
    if not after < min(_ALIKE, before / _FALL):  # NaN where there is no number
        return []
    value = float(scalar_loss(loss, flow.output).detach())
    try:
        constant, slope, apart = _at_their_means(flow, loss, outputs)
        near = _NEAR * (_at_random(flow, loss, outputs) - constant)
    except TraceError:  # a loss that refuses other outputs, as one of probabilities does, is no loss of views
        return []
    if not (constant < value < constant + near and slope < near and apart <= _APART * slope):
        return []
    index = _first_alike(flow, len(held[0]))
    return [
        Finding(
            kind="rank_collapse",
            severity="warning",
            steps=(index,),
            module_path=flow.steps[index].module_path,
            confidence=1.0,
            evidence=f"what tells samples apart is {before:.2g} of the energy of the input, and {after:.2g} or less of "
            f"that of each of the {len(held)} outputs, below {_ALIKE:g} from {flow.steps[index].name} on; with every "
            f"output at its mean over the samples the loss goes from {value:.5g} to {constant:.5g}, and its gradient "
            "there leads nowhere: the loss is least for a constant",
            remedy="stop the gradient of one of the two views (z.detach()), with a predictor on the other; or add a "
            "term to the loss that keeps samples apart, by their variance or by negative pairs",
            reference="Chen and He, Exploring simple Siamese representation learning, 2021; Bardes, Ponce and LeCun, "
            "VICReg, 2022",
            numbers={"before": before, "after": after, "loss": value, "constant": constant},
        )
    ]


def _at_their_means(flow: Flow, loss: object, outputs: dict[int, Tensor]) -> tuple[float, float, float]:
    """The loss with every output at its mean over samples, and its slope there for a move as large as the outputs.

    Then the part of that slope by which samples are pushed apart.
    """
    leaves: dict[int, Tensor] = {}

    def mean(tensor: Tensor) -> Tensor:
        if id(tensor) not in outputs:
            return tensor
        at = tensor.detach().mean(0, keepdim=True).expand_as(tensor).clone().requires_grad_(True)
        return leaves.setdefault(id(tensor), at)

    scalar = scalar_loss(loss, map_tensors(flow.output, mean))
    ends = list(leaves.values())
    gradients = torch.autograd.grad(scalar, ends, allow_unused=True)
    pushes = [(g, float(at.detach().norm())) for g, at in zip(gradients, ends, strict=True) if g is not None]
    slope = sum(float(g.norm()) * size for g, size in pushes)
    return float(scalar.detach()), slope, sum(float((g - g.mean(0, keepdim=True)).norm()) * size for g, size in pushes)


def _at_random(flow: Flow, loss: object, outputs: dict[int, Tensor]) -> float:
    """The loss with outputs drawn at random, of their size."""
    drawn: dict[int, Tensor] = {}
    for seed, (key, tensor) in enumerate(outputs.items()):
        numbers = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        drawn[key] = (numbers.to(tensor) * tensor.detach().square().mean().sqrt()).requires_grad_(True)
    return float(scalar_loss(loss, map_tensors(flow.output, lambda t: drawn.get(id(t), t))).detach())


def _first_alike(flow: Flow, samples: int) -> int:
    """The first step behind which no state tells samples apart."""
    index = len(flow.steps) - 1
    for step in reversed(flow.steps):
        tensors = [t for t in step.target.tensors if t.dim() > 1 and len(t) == samples]
        if not tensors or not max(map(dispersion, tensors)) < _ALIKE:
            break
        index = step.index
    return index
