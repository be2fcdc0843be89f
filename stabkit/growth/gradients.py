"""How the gradient grows or shrinks on its way back through depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.tracing import Flow, State
from stabkit.tracing.values import random_tensors


@dataclass(frozen=True)
class GradientProfile:
    """Gradient and state norms across depth, per sample.

    Attributes:
        gradient_norms: ``(states, batch)``, Euclidean norm of the gradient with respect to each state.
        state_norms: ``(states, batch)``, Euclidean norm of each state.
        log_growth: ``(steps, batch)``, in nats: log of the gradient norm at a step's source over that at its target.
            Sums over steps to ``log ||g_0|| - log ||g_L||``. ``-inf`` where a step passes nothing back; NaN where
            there was nothing left to pass.
        restarts: states at which a random cotangent was drawn anew, because the step after them passes nothing back
            (a head initialised at zero). Norms before and after such a state are not comparable.
        loss: what was differentiated, in words.
        seed: of the random cotangent.
        batch: number of samples.
    """

    gradient_norms: Tensor
    state_norms: Tensor
    log_growth: Tensor
    restarts: tuple[int, ...]
    loss: str
    seed: int
    batch: int

    @property
    def total_growth(self) -> Tensor:
        """``(batch,)``, log growth over all steps between restarts, in nats."""
        finite = torch.where(self.log_growth.isfinite(), self.log_growth, torch.zeros_like(self.log_growth))
        return finite.sum(0) if self.restarts else self.log_growth.sum(0)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ready for JSON."""
        return {
            "gradient_norms": self.gradient_norms.tolist(),
            "state_norms": self.state_norms.tolist(),
            "log_growth": self.log_growth.tolist(),
            "restarts": list(self.restarts),
            "loss": self.loss,
            "seed": self.seed,
        }


def gradient_profile(flow: Flow, loss: Any = None, *, seed: int = 0) -> GradientProfile:
    """Norms of the gradient at every state, from the chain of vector-Jacobian products.

    The profile is exact: the chain of steps is the model's own backward pass. Norms are taken in float64; products are
    made in the dtype of the model.

    Args:
        flow: a traced forward pass.
        loss: a callable on the model's output that returns a scalar; None pulls back a standard normal cotangent.
        seed: of that cotangent.

    Raises:
        TraceError: the loss is not a differentiable scalar of the output that the flow leads to.

    Example:
        >>> import torch, stabkit
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
        >>> for layer in model: _ = torch.nn.init.eye_(layer.weight).data.mul_(0.5)
        >>> profile = gradient_profile(stabkit.trace(model, torch.ones(2, 4)))
        >>> [round(float(g), 4) for g in profile.log_growth[:, 0]]
        [-0.6931, -0.6931, -0.6931]
    """
    cotangents = flow.cotangent(loss, seed=seed)
    norms = [_norms(flow.states[-1], cotangents)]
    growth: list[Tensor] = []
    restarts: list[int] = []
    for step in reversed(flow.steps):
        cotangents = step.vjp(cotangents)
        norm = _norms(step.source, cotangents)
        growth.append(_log_ratio(norm, norms[-1]))
        if loss is None and step.index > 0 and not bool((norm > 0).any()) and not bool(norm.isnan().any()):
            cotangents = random_tensors(step.source.values, seed + step.index)
            norm = _norms(step.source, cotangents)
            restarts.append(step.index)
        norms.append(norm)
    return GradientProfile(
        gradient_norms=torch.stack(norms[::-1]),
        state_norms=torch.stack([_norms(state, state.tensors) for state in flow.states]),
        log_growth=torch.stack(growth[::-1]),
        restarts=tuple(sorted(restarts)),
        loss="standard normal cotangent" if loss is None else getattr(loss, "__name__", type(loss).__name__),
        seed=seed,
        batch=flow.batch,
    )


def _norms(state: State, tensors: Any) -> Tensor:
    """Euclidean norm per sample in float64, without overflow."""
    columns = state.space.flatten([tensor.detach().unsqueeze(0) for tensor in tensors]).squeeze(-1)
    norms: Tensor = torch.linalg.vector_norm(columns.to(torch.float64), dim=1).cpu()
    return norms


def _log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``log(numerator / denominator)``; -inf for 0 over something, NaN for 0 over 0."""
    ratio = numerator.log() - denominator.log()
    nothing = (numerator == 0) & (denominator == 0)
    return torch.where(nothing, torch.full_like(ratio, math.nan), ratio)
