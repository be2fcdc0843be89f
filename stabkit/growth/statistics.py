"""Intervals over samples, which speak of one network, and over seeds, which speak of its initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stabkit.errors import ArgumentError
from stabkit.results import Result

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval(Result):
    """A mean with a bootstrap interval.

    Attributes:
        mean: the mean, of the shape of one sample's value.
        low: lower bound.
        high: upper bound.
        scope: what the interval speaks of: ``"samples of this network"`` or ``"seeds and samples"``.
        samples: how many samples there were, over all seeds.
        seeds: the seeds; none for samples of one network.
        confidence: probability that intervals made like this hold the true mean.
    """

    mean: Array
    low: Array
    high: Array
    scope: str
    samples: int
    seeds: tuple[int, ...]
    confidence: float


def over_samples(values: Tensor | Array, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over samples with a bootstrap interval: a statement about this network, on inputs like these.

    Samples share the weights, so it says nothing about other initialisations: for those see `over_seeds`.

    Args:
        values: ``(samples, ...)``, say ``lyapunov_spectrum(flow).exponents``. Logs, not norms: a mean of norms is that
            of the largest.
        confidence: of the interval.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        ArgumentError: there are fewer than two samples.

    Source: Efron, "Bootstrap methods: another look at the jackknife" (1979).

    Example:
        >>> import torch
        >>> found = over_samples(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> float(found.mean), bool(found.low < 2.5 < found.high), found.scope
        (2.5, True, 'samples of this network')
    """
    array = _array(values)
    if len(array) < 2:
        raise ArgumentError(f"values has {len(array)} sample; an interval needs at least 2")
    rng = np.random.default_rng(seed)
    means = np.stack([array[rng.integers(0, len(array), len(array))].mean(axis=0) for _ in range(resamples)])
    low, high = _bounds(means, confidence)
    return Interval(array.mean(axis=0), low, high, "samples of this network", len(array), (), confidence)


def over_seeds(
    measure: Callable[[int], Tensor | Array],
    seeds: Iterable[int] = range(8),
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over initialisations with a hierarchical bootstrap interval: a statement about how models are made.

    Whole seeds are drawn with replacement, then samples within each, so that what samples of one network share is
    counted once.

    Args:
        measure: builds a model from a seed and returns ``(samples, ...)``, say
            ``lambda s: lyapunov_spectrum(stabkit.trace(make(s), x)).exponents``.
        seeds: the seeds.
        confidence: of the interval.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        ArgumentError: there are fewer than two seeds.

    Source: Davison and Hinkley, "Bootstrap methods and their application" (1997), section 3.8.

    Example:
        >>> import torch
        >>> found = over_seeds(lambda s: torch.randn(4, generator=torch.Generator().manual_seed(s)), range(10))
        >>> found.samples, bool(found.low < 0 < found.high), found.scope
        (40, True, 'seeds and samples')
    """
    chosen = tuple(seeds)
    if len(chosen) < 2:
        raise ArgumentError(f"seeds={chosen}; an interval over initialisations needs at least 2")
    groups = [_array(measure(s)) for s in chosen]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        means.append(np.mean([g[rng.integers(0, len(g), len(g))].mean(axis=0) for g in drawn], axis=0))
    low, high = _bounds(np.stack(means), confidence)
    mean: Array = np.asarray(np.mean([group.mean(axis=0) for group in groups], axis=0))
    return Interval(mean, low, high, "seeds and samples", sum(map(len, groups)), chosen, confidence)


def _array(values: Tensor | Array) -> Array:
    array: Array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    if array.ndim == 0 or len(array) == 0:
        raise ArgumentError(f"values has shape {array.shape}; expected (samples, ...)")
    return array


def _bounds(means: Array, confidence: float) -> tuple[Array, Array]:
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence}; expected a probability between 0 and 1")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return np.asarray(low), np.asarray(high)
