"""How the gradient grows or shrinks on its way back through depth."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stabkit.errors import ArgumentError, TraceError
from stabkit.growth.arguments import check_flow
from stabkit.growth.frames import tangents, wide
from stabkit.growth.parameters import ParameterGradients, parameter_gradients
from stabkit.results import Result
from stabkit.tracing import Flow, Iteration
from stabkit.tracing.values import random_tensors

if TYPE_CHECKING:
    pass

# magnitudes below which a gradient entry is lost: halfway to the smallest subnormal numbers it is rounded away
THRESHOLDS: dict[str, float] = {"fp16": 2.0**-24, "bf16": 2.0**-133, "adam_eps": 1e-8}
_FAR = 60.0  # powers of two by which a cotangent may grow or shrink before it is rescaled
_PROBE = 1_000_003  # between the seeds of two cotangents: more than the restarts within one add


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
        seed: of the random cotangent.
        batch: number of samples; 1 when the norms are those of the whole batch.
        all_log_growth: ``(cotangents, steps, batch)``, for each random cotangent; ``log_growth`` is their mean.
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
        from scipy.stats import t

        count = len(self.all_log_growth)
        if count < 2:
            raise ArgumentError("an interval needs several random cotangents: gradient_profile(flow, cotangents=8)")
        half = float(t.ppf(0.5 + confidence / 2, count - 1)) * self.all_log_growth.std(0) / math.sqrt(count)
        return self.log_growth - half, self.log_growth + half

    def _contents(self) -> dict[str, Any]:
        left_out = ("all_log_growth", "batch")
        named = {name: value for name, value in super()._contents().items() if name not in left_out}
        return {**named, "relative_growth": self.relative_growth, "cotangents": len(self.all_log_growth)}


def gradient_profile(
    flow: Flow | Iteration,
    loss: Any = None,
    *,
    cotangents: int = 1,
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
        cotangents: how many, when there is no loss; they are pulled back together.
        per_sample: norms of every sample's gradient; False for those of the whole batch at once.
        parameters: also the gradients of the parameters that every step uses, which runs the model twice more and
            needs a loss. None measures them when there is a loss and they can be shared out among the steps. They are
            those of the whole batch; ``stabkit.growth.parameter_gradients(flow, loss, per_sample=True)`` has each
            sample's.
        seed: of the first cotangent.

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
    if isinstance(cotangents, bool) or not isinstance(cotangents, int) or cotangents < 1:
        raise TraceError(f"cotangents={cotangents!r}; expected a whole number of at least 1")
    if loss is not None and cotangents > 1:
        raise TraceError(f"cotangents={cotangents} with a loss; a loss has one gradient, so leave one of them out")
    found, why = _parameters(flow, loss, parameters)
    if loss is None:
        pulled = _pull_back(flow, [flow.cotangent(seed=seed + _PROBE * i) for i in range(cotangents)], seed)
        words = "standard normal cotangent" if cotangents == 1 else f"{cotangents} standard normal cotangents"
    else:
        pulled, words = _pull_back(flow, [flow.cotangent(loss)], None), _name(loss)
    return _profile(flow, pulled, slice(None), words, seed, per_sample, loss is None, found, why)


def gradient_profiles(
    flow: Flow | Iteration, losses: Sequence[Callable[[Any], Tensor]], *, per_sample: bool = True
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
    pulled = _pull_back(flow, [flow.cotangent(loss) for loss in losses], None)
    return tuple(_profile(flow, pulled, slice(i, i + 1), _name(loss), 0, per_sample) for i, loss in enumerate(losses))


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))


@dataclass
class _Pulled:
    """Logs of norms ``(states, batch, cotangents)``, growth ``(steps, batch, cotangents)``, and shares of entries."""

    logs: Tensor
    growth: Tensor
    below: dict[str, Tensor]
    sizes: list[int]
    restarts: tuple[int, ...]


def _pull_back(flow: Flow | Iteration, cotangents: list[list[Tensor]], seed: int | None) -> _Pulled:
    """Pull several cotangents back through all steps at once; with a seed, draw anew before a step that is silent."""
    steps = len(flow)
    last = flow.space if isinstance(flow, Iteration) else flow.states[-1].space
    columns = last.flatten(
        [torch.stack([tensor.detach() for tensor in parts]) for parts in zip(*cotangents, strict=True)]
    )
    powers = torch.zeros(last.batch, len(cotangents), dtype=torch.float64)
    logs = torch.empty(steps + 1, *powers.shape, dtype=torch.float64)
    growth = torch.empty(steps, *powers.shape, dtype=torch.float64)
    below = {name: torch.empty_like(logs) for name in THRESHOLDS}
    sizes = [columns.shape[1]]
    restarts: list[int] = []
    logs[steps] = _note(columns, powers, below, steps)
    for index, pull in _pulls(flow, len(cotangents)):
        columns, powers = _rescaled(columns, powers)
        columns = pull(columns)
        logs[index] = _note(columns, powers, below, index)
        growth[index] = _difference(logs[index], logs[index + 1])
        if seed is not None and index > 0 and bool(logs[index].isneginf().all()):
            columns = _drawn(flow, index, [seed + _PROBE * i + index for i in range(len(cotangents))])
            powers = torch.zeros_like(powers)
            logs[index] = _note(columns, powers, below, index)
            restarts.append(index)
        sizes.append(columns.shape[1])
    return _Pulled(logs, growth, below, sizes[::-1], tuple(sorted(restarts)))


def _pulls(flow: Flow | Iteration, count: int) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """Every step's J^T U, from the last step to the first."""
    with contextlib.closing(tangents(flow, count, adjoint=True)) as pieces:  # type: ignore[type-var]
        for piece in pieces:
            if piece.multiply is not None:
                yield piece.steps.start, piece.multiply
            elif piece.dense is not None:
                for place in range(len(piece.steps) - 1, -1, -1):
                    yield piece.steps[place], functools.partial(_transposed_product, piece.dense[place])


def _transposed_product(J: Tensor, columns: Tensor) -> Tensor:
    return J.mT @ columns.to(J)


def _drawn(flow: Flow | Iteration, index: int, seeds: list[int]) -> Tensor:
    if isinstance(flow, Iteration):
        shape = (flow.batch, flow.space.size)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(drawn, dim=2).to(flow.space.device, flow.space.dtype)
    state = flow.states[index]
    parts = zip(*[random_tensors(state.values, seed) for seed in seeds], strict=True)
    return state.space.flatten([torch.stack(tensors) for tensors in parts])


def _note(columns: Tensor, powers: Tensor, below: dict[str, Tensor], place: int) -> Tensor:
    """Logs of the norms, in float64 and without overflow; shares of small entries are written to their place."""
    exact = wide(columns)
    for name, threshold in THRESHOLDS.items():
        limits = threshold * torch.exp2(-powers).to(exact.device).unsqueeze(1)
        below[name][place] = (exact.abs() < limits).double().mean(1).cpu()
    norms: Tensor = torch.linalg.vector_norm(exact, dim=1).cpu()
    return norms.log() + powers * math.log(2)


def _rescaled(columns: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that came near the ends of the range of a float, multiplied by powers of two, which is exact."""
    logs = torch.linalg.vector_norm(wide(columns), dim=1).log2().cpu()
    far = logs.isfinite() & (logs.abs() > _FAR)
    if not bool(far.any()):
        return columns, powers
    shift = torch.where(far, logs.round(), 0.0)
    return columns * torch.exp2(-shift).to(columns).unsqueeze(1), powers + shift


def _difference(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Difference of logs; -inf for 0 over something, NaN for 0 over 0."""
    nothing = numerator.isneginf() & denominator.isneginf()
    return torch.where(nothing, math.nan, numerator - denominator)


def _profile(
    flow: Flow | Iteration,
    pulled: _Pulled,
    chosen: slice,
    words: str,
    seed: int,
    per_sample: bool,
    random: bool = False,
    parameters: ParameterGradients | None = None,
    notes: tuple[str, ...] = (),
) -> GradientProfile:
    logs, growth = pulled.logs[..., chosen], pulled.growth[..., chosen]
    below = None if random else {name: share[..., chosen].mean(2) for name, share in pulled.below.items()}
    if isinstance(flow, Iteration):
        states = torch.linalg.vector_norm(flow.trajectory().double(), dim=2).cpu()
    else:
        states = torch.stack([torch.linalg.vector_norm(wide(state.flatten()), dim=1).cpu() for state in flow.states])
    if not per_sample:
        logs = 0.5 * torch.logsumexp(2 * logs, dim=1, keepdim=True)
        growth = _whole_growth(logs, pulled)
        below = below and {name: share.mean(1, keepdim=True) for name, share in below.items()}
        states = torch.linalg.vector_norm(states, dim=1, keepdim=True)
    mean_logs = logs.mean(2)
    return GradientProfile(
        gradient_norms=mean_logs.exp(),
        log_gradient_norms=mean_logs,
        state_norms=states,
        log_growth=growth.mean(2),
        restarts=pulled.restarts,
        loss=words,
        seed=seed,
        batch=mean_logs.shape[1],
        all_log_growth=growth.permute(2, 0, 1),
        below=below,
        parameters=parameters,
        notes=notes,
    )


def _parameters(
    flow: Flow | Iteration, loss: Any, wanted: bool | None
) -> tuple[ParameterGradients | None, tuple[str, ...]]:
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


def _whole_growth(logs: Tensor, pulled: _Pulled) -> Tensor:
    """Growth of the whole batch. At a restart nothing came through in any sample, so neither did it in the whole."""
    growth = _difference(logs[:-1], logs[1:])
    for index in pulled.restarts:
        growth[index] = -math.inf
    return growth
