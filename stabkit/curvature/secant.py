"""The curvature along an update that was made, from the gradients before and after it: no products, no closure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.curvature.stability import FLOOR, Stability, raise_small
from stabkit.curvature.updates import Update, plain_update, read_update, trained_by
from stabkit.results import Result

SAMPLED = 1024  # entries of a tensor that stand for all


@dataclass(frozen=True)
class Secant(Result):
    """The curvature along the last update, from two gradients of two batches.

    It is noisy: the batches differ, and of plain noise the ratio is 0.5. Beyond 1 the gradient has turned round along
    the update and grown, which noise does now and then, and not several times in a row.

    Attributes:
        curvature: of the loss along the update, in the metric of the preconditioner, weight decay included.
        threshold: the largest curvature at which updates stay bounded.
        ratio: of the two.
        learning_rate: the rate, of the group with the largest one.
        largest_stable_lr: the rate at which the ratio is 1.
        update_ratio: the norm of the update over that of the parameters, or of such as layers usually start with where
            these are smaller.
    """

    curvature: float
    threshold: float
    ratio: float
    learning_rate: float
    largest_stable_lr: float
    update_ratio: float


@dataclass(frozen=True, eq=False)
class _Point:
    """Weights and gradients at some training step, up to 1024 entries of each."""

    weights: Tensor
    gradients: Tensor
    state: Mapping[Any, Any]


@dataclass(frozen=True)
class Reach:
    """How far an update that was made goes.

    Attributes:
        fall: of the loss along it, by the gradient before it: that of a loss without curvature.
        update_ratio: the norm of the update over that of the parameters, as of `Secant`.
        second: that of the matrix that is moved furthest but one; 0 where there is but one.
    """

    fall: float
    update_ratio: float
    second: float


class SecantCurvature:
    """Measures it from one training step to the next, on up to 1024 evenly spaced entries of each parameter.

    Args:
        model: whose parameters the optimizer trains.
        optimizer: that trains them.

    Raises:
        ArgumentError: the optimizer trains other parameters.

    Example:
        >>> model, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> secant = SecantCurvature(model, sgd)
        >>> for step in range(2):
        ...     sgd.zero_grad()
        ...     model(x).square().mean().backward()
        ...     found = secant.between(secant.point()) if step else None
        ...     secant.hold(secant.point())
        ...     _ = sgd.step()
        >>> round(found().ratio, 3)
        0.5
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._held: _Point | None = None
        self._follow(trained_by(optimizer, model))

    def _follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Measure these from now on: layers are frozen and thawed while a model trains, and replaced."""
        self._parameters, self._held = tuple(parameters), None
        self._strides = {id(p): max(1, p.numel() // SAMPLED) | 1 for p in self._parameters}  # odd: over all columns
        # rows of standard deviation 1 / sqrt(3 fan-in), as torch's layers begin: what starts at zero moves far at first
        self._usual = sum(p.shape[0] / 3.0 for p in self._parameters if p.dim() > 1)
        self._factors: Tensor | None = None

    def point(self, scale: Tensor | float = 1.0) -> _Point | None:
        """Weights and gradients now, between ``backward`` and the optimizer's step; None where some are sparse.

        Where others are trained than before, what is held is let go of.

        Args:
            scale: what the gradients are multiplied by.
        """
        trained = [p for g in self._optimizer.param_groups for p in plain_update(g["params"])]
        if [*map(id, trained)] != [*map(id, self._parameters)]:
            self._follow(trained)
        grads = [p.grad for p in self._parameters]
        if not grads or any(g is not None and g.is_sparse for g in grads):
            return None
        with torch.no_grad():
            weights = [self._sampled(p, p) for p in self._parameters]
            kept = [
                torch.zeros_like(w) if g is None else self._sampled(g, p)
                for p, g, w in zip(self._parameters, grads, weights, strict=True)
            ]
            gradients = torch.cat(kept).float()
            if self._factors is None:
                counts = [p.numel() / max(1, len(w)) for p, w in zip(self._parameters, weights, strict=True)]
                lengths = torch.tensor([len(w) for w in weights])
                self._factors = torch.tensor(counts).repeat_interleave(lengths).to(gradients.device)
            plain = isinstance(scale, float) and scale == 1.0
            state = _SampledState(self._optimizer.state, self._sampled)
            return _Point(torch.cat(weights).float(), gradients if plain else gradients / scale, state)

    def hold(self, point: _Point | None) -> None:
        """Keep what the next measurement begins with; None lets go of it."""
        self._held = point

    @property
    def holds(self) -> bool:
        """Whether there is a point before the update."""
        return self._held is not None

    def reach(self) -> Reach | None:
        """How far the update goes that was made since the point that is held; None where no size is usual for weights.

        That is where biases and scales alone are trained. It reads numbers of a device, and so waits for it.
        """
        before = self._held
        if before is None or self._factors is None or not self._usual:
            return None
        with torch.no_grad():
            moved = torch.cat([self._sampled(p, p) for p in self._parameters]).float() - before.weights
            weighed = moved * self._factors
            numbers = [-(before.gradients @ weighed), moved @ weighed, before.weights.square() @ self._factors]
            sampled = [-(-p.numel() // self._strides[id(p)]) for p in self._parameters]
            parts = zip(
                self._parameters, torch.split(moved, sampled), torch.split(before.weights, sampled), strict=True
            )
            for p, change, held in parts:
                if p.dim() > 1:
                    usual = p.shape[0] / 3.0 / (p.numel() / len(held))
                    numbers.append(change.square().sum() / held.square().sum().clamp_min(usual))
            fall, length, weights, *matrices = torch.stack(numbers).tolist()
        second = sorted(matrices)[-2] if len(matrices) > 1 else 0.0
        return Reach(fall, (length / max(weights, self._usual)) ** 0.5, second**0.5)

    def between(self, point: _Point | None) -> PendingSecant | None:
        """The curvature from the point that is held to this one; None where one of them is missing.

        Raises:
            ArgumentError: no threshold is known for the optimizer, or none yet.
        """
        before = self._held
        if before is None or point is None or self._factors is None:
            return None
        update = read_update(self._optimizer, self._model, state=point.state)
        with torch.no_grad():
            moved = point.weights - before.weights
            weighed = moved * self._factors
            turned = point.gradients - before.gradients
            size = length = moved @ weighed
            if not update.is_plain:
                scales = self._spread(update.scales, moved)
                raise_small(scales, FLOOR)
                size = (moved * weighed * scales).nan_to_num(0.0, 0.0).sum()  # infinite where nothing moves
                if any(update.decays):
                    turned = turned + moved * self._spread(update.decays, moved)
            curved = (turned @ weighed) * (-1.0 if update.ascends else 1.0)
            all_weights = before.weights.square() @ self._factors
            return PendingSecant(torch.stack([curved, size, length, all_weights.clamp_min(self._usual)]), update)

    def _sampled(self, tensor: Tensor, like: nn.Parameter) -> Tensor:
        return tensor.detach().reshape(-1)[:: self._strides[id(like)]]

    def _spread(self, values: Sequence[Tensor | float], moved: Tensor) -> Tensor:
        """Numbers or sampled tensors for the parameters, one after the other."""
        found = torch.empty_like(moved)
        lengths = [-(-p.numel() // self._strides[id(p)]) for p in self._parameters]
        for place, value in zip(torch.split(found, lengths), values, strict=True):
            place.copy_(value.reshape(-1)) if isinstance(value, Tensor) else place.fill_(value)
        return found


class PendingSecant:
    """A measurement whose numbers are on a device; calling it reads them."""

    def __init__(self, numbers: Tensor, update: Update) -> None:
        self.numbers, self._update = numbers, update

    def __call__(self) -> Secant | None:
        """The result; None where nothing moved or something is not finite."""
        curved, size, length, weights = self.numbers.tolist()
        if not (size > 0 and abs(curved) < float("inf")):
            return None
        stability = Stability.of(self._update, curved / size)
        ratio = (length / weights) ** 0.5 if weights > 0 else float("inf")
        return Secant(curved / size, **vars(stability), update_ratio=ratio)


class _SampledState(Mapping[Any, Any]):
    """An optimizer's state of which only some entries of the large tensors are seen."""

    def __init__(self, state: Mapping[Any, Any], sample: Any) -> None:
        self._state, self._sample = state, sample

    def __getitem__(self, p: Any) -> Mapping[str, Any]:
        return _Entry(self._state[p], p, self._sample)

    def __contains__(self, p: object) -> bool:
        return p in self._state

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _Entry(Mapping[str, Any]):
    def __init__(self, entry: Mapping[str, Any], p: Any, sample: Any) -> None:
        self._entry, self._p, self._sample = entry, p, sample

    def __getitem__(self, key: str) -> Any:
        value = self._entry[key]
        return self._sample(value, self._p) if isinstance(value, Tensor) and value.shape == self._p.shape else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry)

    def __len__(self) -> int:
        return len(self._entry)
