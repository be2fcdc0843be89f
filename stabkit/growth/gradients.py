"""How the gradient grows or shrinks on its way back through depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError, TraceError
from stabkit.growth.parameters import ParameterGradients, parameter_gradients
from stabkit.results import Result
from stabkit.statistics import student_factor
from stabkit.tracing import FlowLike
from stabkit.tracing.flow_checks import check_flow
from stabkit.walk import (
    Cotangents,
    Observer,
    Passage,
    Walk,
    balanced,
    loss_columns,
    probe_seeds,
    random_columns,
    walk_back,
    wide,
)

# magnitudes below which a gradient entry is lost: halfway to the smallest subnormal numbers it is rounded away
THRESHOLDS: dict[str, float] = {"fp16": 2.0**-24, "bf16": 2.0**-133, "adam_eps": 1e-8}


@dataclass(frozen=True)
class GradientProfile(Result):
    """Gradient and state norms across depth, per sample.

    Attributes:
        gradient_norms: ``(states, batch)``, Euclidean norm of the gradient with respect to each state; the geometric
            mean over random cotangents when there are several. 0 where it is below the range of a float.
        log_gradient_norms: ``(states, batch)``, their natural logs, exact in any range.
        state_norms: ``(states, batch)``, Euclidean norm of each state.
        log_growth: ``(steps, batch)``, in nats: log of the gradient norm at a step's source over that at its target.
            Sums over steps to ``log ||g_0|| - log ||g_L||``. ``-inf`` where a step passes nothing back; NaN where
            there was nothing left to pass.
        restarts: states at which a random cotangent was drawn anew, because the step after them passes nothing back
            (a head initialised at zero). Norms before and after such a state are not comparable.
        loss: what was differentiated, in words: the name of the loss, or that there were random cotangents.
        seed: the seed of the random cotangent.
        batch: number of samples; 1 when the norms are those of the whole batch.
        all_log_growth: ``(probes, steps, batch)``, for each random cotangent; ``log_growth`` is their mean.
        below: for ``"fp16"`` (2^-24), ``"bf16"`` (2^-133) and ``"adam_eps"`` (1e-8): ``(states, batch)``, share of the
            entries of the gradient that are smaller, zeros included. None for random cotangents, whose size means
            nothing.
        parameters: gradients of the parameters that each step uses; None without a loss.
        notes: why something was not measured.
    """

    gradient_norms: Tensor
    log_gradient_norms: Tensor
    state_norms: Tensor
    log_growth: Tensor
    restarts: tuple[int, ...]
    loss: str
    seed: int
    batch: int
    all_log_growth: Tensor = field(default_factory=lambda: torch.empty(0))
    below: dict[str, Tensor] | None = None
    parameters: ParameterGradients | None = None
    notes: tuple[str, ...] = ()

    @property
    def total_growth(self) -> Tensor:
        """``(batch,)``, log growth over all steps between restarts, in nats."""
        finite = torch.where(self.log_growth.isfinite(), self.log_growth, torch.zeros_like(self.log_growth))
        return finite.sum(0) if self.restarts else self.log_growth.sum(0)

    @property
    def relative_growth(self) -> Tensor:
        """``(steps, batch)``, growth of the gradient relative to that of the state, in nats.

        ``log_growth - log(||x_{i+1}|| / ||x_i||)``: with normalisation layers a gradient that shrinks where the state
        grows is no loss of learning. It does not change when a state is measured in other units.
        """
        logs = self.state_norms.log()
        return self.log_growth - (logs[1:] - logs[:-1])

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds ``(steps, batch)`` of `log_growth` over random cotangents, from Student's t.

        Raises:
            ArgumentError: there is only one cotangent, which says nothing about others.
        """
        count = len(self.all_log_growth)
        if count < 2:
            raise ArgumentError("an interval needs several random cotangents: gradient_profile(flow, probes=8)")
        half = student_factor(count, confidence) * self.all_log_growth.std(0) / math.sqrt(count)
        return self.log_growth - half, self.log_growth + half

    def _contents(self) -> dict[str, Any]:
        left_out = ("all_log_growth", "batch")
        named = {name: value for name, value in super()._contents().items() if name not in left_out}
        return {**named, "relative_growth": self.relative_growth, "probes": len(self.all_log_growth)}


@accepts
def gradient_profile(
    flow: FlowLike,
    loss: Any = None,
    *,
    probes: int = 1,
    per_sample: bool = True,
    parameters: bool | None = None,
    seed: int = 0,
) -> GradientProfile:
    """Norms of the gradient at every state, from the chain of vector-Jacobian products.

    The profile is exact: the chain of steps is the model's own backward pass. Norms are taken in float64; products are
    made in the dtype of the model.

    Args:
        flow: a traced forward pass, or an iterated map.
        loss: a callable on the model's output that returns a scalar; None pulls back standard normal cotangents.
        probes: how many random cotangents, when there is no loss; they are pulled back together.
        per_sample: norms of every sample's gradient; False for those of the whole batch at once.
        parameters: also the gradients of the parameters that every step uses, which runs the model twice more and
            needs a loss. None measures them when there is a loss and they can be shared out among the steps. They are
            those of the whole batch; ``stabkit.growth.parameter_gradients(flow, loss, per_sample=True)`` has each
            sample's.
        seed: the seed of the first cotangent.

    Raises:
        TraceError: the loss is not a differentiable scalar of the output that the flow leads to, or an argument makes
            no sense.
        ArgumentTypeError: ``flow`` is no flow.

    Example:
        >>> import torch, stabkit
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
        >>> for layer in model: _ = torch.nn.init.eye_(layer.weight).data.mul_(0.5)
        >>> profile = gradient_profile(stabkit.trace(model, torch.ones(2, 4)))
        >>> [round(float(g), 4) for g in profile.log_growth[:, 0]]
        [-0.6931, -0.6931, -0.6931]
    """
    check_flow(flow)
    if loss is not None and probes > 1:
        raise TraceError(f"probes={probes} with a loss; a loss has one gradient, so leave one of them out")
    found, why = _parameters(flow, loss, parameters)
    if loss is None:
        seeds = probe_seeds(seed, probes)
        walk = walk_back(flow, random_columns(flow, seeds), seeds, renewal="together")
        words = "standard normal cotangent" if probes == 1 else f"{probes} standard normal cotangents"
        return _profile(flow, walk, None, slice(None), words, seed, per_sample, found, why)
    walk, small = _walk(flow, [loss])
    return _profile(flow, walk, small, slice(None), _name(loss), seed, per_sample, found, why)


def gradient_profiles(
    flow: FlowLike, losses: Sequence[Callable[[Any], Tensor]], *, per_sample: bool = True
) -> tuple[GradientProfile, ...]:
    """One `gradient_profile` for each of several losses, pulled back together.

    Example:
        >>> import torch, stabkit
        >>> flow = stabkit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), torch.ones(1, 2))
        >>> [p.loss for p in gradient_profiles(flow, [torch.sum, torch.norm])]
        ['sum', 'norm']
    """
    check_flow(flow)
    if not losses:
        raise TraceError("losses is empty; give at least one callable on the model's output")
    walk, small = _walk(flow, losses)
    return tuple(
        _profile(flow, walk, small, slice(i, i + 1), _name(loss), 0, per_sample) for i, loss in enumerate(losses)
    )


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))


class _SmallEntries(Observer):
    """Shares of the entries of a gradient that are smaller than what a format or an optimizer holds.

    Attributes:
        shares: ``(states, batch, losses)``, by the name of the threshold.
    """

    def __init__(self, last: Cotangents, steps: int) -> None:
        self.shares = {name: torch.empty(steps + 1, *last.powers.shape, dtype=torch.float64) for name in THRESHOLDS}
        self._note(last, steps)

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        self._note(passage.leaving, passage.step.index)

    def _note(self, cotangents: Cotangents, place: int) -> None:
        entries = wide(cotangents.columns).abs()
        units = torch.exp2(-cotangents.powers).to(entries.device).unsqueeze(1)
        for name, threshold in THRESHOLDS.items():
            self.shares[name][place] = (entries < threshold * units).double().mean(1).cpu()


def _walk(flow: FlowLike, losses: Sequence[Any]) -> tuple[Walk, _SmallEntries]:
    """The gradients of some losses pulled back together, and how many of their entries are small."""
    columns = loss_columns(flow, losses)
    small = _SmallEntries(balanced(columns), len(flow))
    return walk_back(flow, columns, observers=[small]), small


def _difference(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Difference of logs; -inf for 0 over something, NaN for 0 over 0."""
    nothing = numerator.isneginf() & denominator.isneginf()
    return torch.where(nothing, math.nan, numerator - denominator)


def _profile(
    flow: FlowLike,
    walk: Walk,
    small: _SmallEntries | None,
    chosen: slice,
    words: str,
    seed: int,
    per_sample: bool,
    parameters: ParameterGradients | None = None,
    notes: tuple[str, ...] = (),
) -> GradientProfile:
    logs, growth = walk.log_norms[..., chosen], walk.growth[..., chosen]
    below = None if small is None else {name: share[..., chosen].mean(2) for name, share in small.shares.items()}
    states = torch.stack([torch.linalg.vector_norm(wide(state), dim=1).cpu() for state in flow.flat_states()])
    if not per_sample:
        logs = 0.5 * torch.logsumexp(2 * logs, dim=1, keepdim=True)
        growth = _whole_growth(logs, walk.restarts)
        below = below and {name: share.mean(1, keepdim=True) for name, share in below.items()}
        states = torch.linalg.vector_norm(states, dim=1, keepdim=True)
    mean_logs = logs.mean(2)
    return GradientProfile(
        gradient_norms=mean_logs.exp(),
        log_gradient_norms=mean_logs,
        state_norms=states,
        log_growth=growth.mean(2),
        restarts=walk.restarts,
        loss=words,
        seed=seed,
        batch=mean_logs.shape[1],
        all_log_growth=growth.permute(2, 0, 1),
        below=below,
        parameters=parameters,
        notes=notes,
    )


def _parameters(flow: FlowLike, loss: Any, wanted: bool | None) -> tuple[ParameterGradients | None, tuple[str, ...]]:
    """Gradients of the parameters, or why there are none."""
    if wanted and loss is None:
        raise TraceError("parameters=True is for the gradients of the parameters, which need a loss=")
    if wanted is False or loss is None:
        return None, ()
    try:
        return parameter_gradients(flow, loss), ()
    except TraceError as error:
        if wanted:
            raise
        return None, (f"no gradients of the parameters: {error}",)


def _whole_growth(logs: Tensor, restarts: Sequence[int]) -> Tensor:
    """Growth of the whole batch. At a restart nothing came through in any sample, so neither did it in the whole."""
    growth = _difference(logs[:-1], logs[1:])
    for index in restarts:
        growth[index] = -math.inf
    return growth
