"""Lyapunov exponents by QR over the steps of a flow, each with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import TraceError
from stabkit.growth.arguments import checked_k, time_per_step
from stabkit.growth.qr_sweep import SweptFrame, propagate, start_frame
from stabkit.results import Result
from stabkit.statistics import series_error
from stabkit.tracing import FlowLike

DIRECTIONS = ("auto", "forward", "adjoint")
_ALL = 64  # as many exponents are computed when none are asked for
_TRANSIENT = 1000
_FEWEST = 20  # steps below which no error bar is believed
_APART = 4.0  # standard errors by which two halves of a run may differ


@dataclass(frozen=True)
class LyapunovSpectrum(Result):
    """Lyapunov exponents of every sample, in nats per step, the largest first.

    They come from QR decompositions along the flow. Over a finite number of steps they differ from the finite-time
    exponents (singular values of the product) and from logs of eigenvalues.

    Attributes:
        exponents: ``(batch, k)``; NaN where `saturated`.
        standard_errors: ``(batch, k)``, corrected for autocorrelation.
        local_growth: ``(steps, batch, k)``, of every step; exponents are its means over the steps that count. NaN at
            steps that a sample did not take (packed sequences), -inf where it is saturated.
        converged: ``(batch, k)``, whether the error is within the tolerance and the halves of the run agree.
        halves: ``(2, batch, k)``, means over the first and the second half of the steps that count.
        autocorrelation_times: ``(batch, k)``, in steps.
        saturated: ``(batch, k)``, where a step multiplied a direction by zero in floating point: a derivative
            underflowed (tanh far out), a unit is dead, or the step has lower rank.
        volume_errors: ``(batch,)``, sum of all exponents minus the mean of log |det J|; None unless all were asked for.
        direction: ``"forward"`` (J V) or ``"adjoint"`` (J^T U). At finite depth the two differ.
        interval: how many steps lay between two QR decompositions, on average.
        discarded: steps at the beginning of the sweep that do not count, while the frame turns into place.
        steps: ``(batch,)``, steps that count.
        step_size: time per step, None when a step is a step.
        size: coordinates of the narrowest state; there are that many exponents.
        tolerance: absolute (nats per step, or per unit of time where there is one) and relative.
        seed: the seed of the first frame.
        stopped: ``"done"``, or ``"interrupted"`` by the keyboard: then ``steps`` counts what had been done by then.
    """

    exponents: Tensor
    standard_errors: Tensor
    local_growth: Tensor
    converged: Tensor
    halves: Tensor
    autocorrelation_times: Tensor
    saturated: Tensor
    volume_errors: Tensor | None
    direction: str
    interval: float
    discarded: int
    steps: Tensor
    step_size: float | None
    size: int
    tolerance: tuple[float, float]
    seed: int
    stopped: str = "done"

    def __str__(self) -> str:
        unit = "per step" if self.step_size is None else "per unit of time"
        scale = self.step_size or 1.0
        lines = [
            f"Lyapunov exponents in nats {unit}, {self.direction}, {int(self.steps.min())} steps"
            f"{' (interrupted)' if self.stopped != 'done' else ''}, mean over {len(self.exponents)} samples:"
        ]
        for i in range(self.exponents.shape[1]):
            value, error = float(self.exponents[:, i].mean()), float(self.standard_errors[:, i].mean())
            words = "converged" if bool(self.converged[:, i].all()) else "NOT converged"
            words = "saturated" if bool(self.saturated[:, i].any()) else words
            lines.append(f"  {i + 1:3d}  {value / scale:+.6f} +- {error / scale:.1g}  {words}")
        return "\n".join(lines)

    @property
    def exponents_per_time(self) -> Tensor:
        """``(batch, k)``, in nats per unit of time; per step where the step size is not known."""
        return self.exponents / (self.step_size or 1.0)

    @property
    def standard_errors_per_time(self) -> Tensor:
        """``(batch, k)``, of `exponents_per_time`."""
        return self.standard_errors / (self.step_size or 1.0)

    @property
    def sum(self) -> Tensor:
        """``(batch,)``, sum of the exponents: growth of the k-dimensional volume, in nats per step."""
        return self.exponents.sum(1)

    @property
    def entropy(self) -> Tensor:
        """``(batch,)``, sum of the positive exponents, in nats per step: a bound on the Kolmogorov-Sinai entropy.

        Source: Ruelle, "An inequality for the entropy of differentiable maps" (1978); Pesin's formula where equal.
        """
        return self.exponents.clamp_min(0).sum(1)

    @property
    def kaplan_yorke_dimension(self) -> Tensor:
        """``(batch,)``, dimension of the attractor by the conjecture of Kaplan and Yorke (1979).

        NaN where the partial sums stay positive over fewer exponents than there are; ``size`` where volume grows.
        """
        return torch.tensor([_kaplan_yorke(row, self.size) for row in self.exponents.tolist()], dtype=torch.float64)

    def _contents(self) -> dict[str, Any]:
        return {**super()._contents(), "kaplan_yorke_dimension": self.kaplan_yorke_dimension}


def _kaplan_yorke(exponents: list[float], size: int) -> float:
    total = 0.0
    for index, exponent in enumerate(exponents):
        if math.isnan(exponent):
            return math.nan
        if total + exponent < 0:
            return index + total / abs(exponent)
        total += exponent
    return float(size) if len(exponents) == size else math.nan


@accepts
def lyapunov_spectrum(
    flow: FlowLike,
    k: int | None = None,
    *,
    direction: str = "auto",
    discard: int | None = None,
    step_size: float | None = None,
    tolerance: tuple[float, float] = (1e-3, 0.05),
    seed: int = 0,
) -> LyapunovSpectrum:
    """The k largest Lyapunov exponents of every sample, with standard errors, in nats per step.

    A frame of k vectors is carried along the flow and kept apart by QR decompositions; the logs of the diagonal of R
    are the growth. Products are made in the dtype of the flow, decompositions in float64. Steps between spaces of
    different size are no obstacle: k is at most the size of the narrowest state.

    A lesson with a picture: ``examples/chaos_in_a_recurrent_network.py``.

    Args:
        flow: from `stabkit.trace`, `stabkit.iterate` or `stabkit.recurrent_flow`.
        k: how many; by default all, up to 64.
        direction: ``"forward"``, ``"adjoint"``, or ``"auto"``: the adjoint over depth, where J^T U costs one backward
            pass, and forward over time, where states are computed anyway. The other one is a check.
        discard: steps that do not count while the frame turns into place: by default none over depth, a tenth of the
            steps but at most 1000 over time. The adjoint over time discards as many at both ends.
        step_size: time per step; by default that of the flow.
        tolerance: absolute and relative error at which an exponent counts as converged.
        seed: the seed of the random frame.

    Returns:
        A `LyapunovSpectrum`; when the keyboard interrupts, of the steps that had been taken by then.

    Raises:
        TraceError: an argument makes no sense for this flow, or a Jacobian is not finite.
        ArgumentTypeError: ``flow`` is no flow.
        KeyboardInterrupt: it came before any step that counts, or in a packed batch.

    Source:
        Benettin, Galgani, Giorgilli and Strelcyn (1980); Geist, Parlitz and Lauterborn, "Comparison of different
        methods for computing Lyapunov exponents" (1990).

    Example:
        >>> import torch, stabkit
        >>> cat = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
        >>> flow = stabkit.iterate(lambda x: (x @ cat.T) % 1, torch.tensor([[0.1, 0.2]], dtype=torch.float64), 500)
        >>> [round(float(x), 6) for x in lyapunov_spectrum(flow).exponents[0]]
        [0.962424, -0.962424]
    """
    k = checked_k(flow, k, _ALL)
    if direction not in DIRECTIONS:
        raise TraceError(f"direction={direction!r}; expected one of {', '.join(DIRECTIONS)}")
    _check_tolerance(tolerance)
    over_time = flow.over_time
    adjoint = direction == "adjoint" or (direction == "auto" and not over_time)
    kept, time = _kept_steps(flow, discard, adjoint), time_per_step(flow, step_size)
    whole = set(flow.sizes) == {k}
    frame = start_frame(flow, k, adjoint=adjoint, seed=seed)
    lengths = flow.lengths
    found = propagate(flow, frame, adjoint=adjoint, volume=whole, partial=lengths is None)
    counted = _taken(kept, found.done, len(flow), adjoint)
    absolute = tolerance[0] * (time or 1.0)
    summary = _summary(found, counted, lengths, (absolute, tolerance[1]))
    spectrum = LyapunovSpectrum(
        **summary,
        direction="adjoint" if adjoint else "forward",
        interval=len(flow) / max(found.decompositions, 1),
        discarded=kept.start if not adjoint or over_time else len(flow) - kept.stop,
        step_size=time,
        size=min(flow.sizes),
        tolerance=tolerance,
        seed=seed,
        stopped="done" if found.done == len(flow) else "interrupted",
    )
    return _sorted(spectrum)


def _check_tolerance(tolerance: Any) -> None:
    right = isinstance(tolerance, tuple | list) and len(tolerance) == 2
    if not right or not all(isinstance(part, int | float) and part >= 0 for part in tolerance):
        raise TraceError(f"tolerance={tolerance!r}; expected two numbers, absolute and relative, such as (1e-3, 0.05)")


def _taken(kept: range, done: int, steps: int, adjoint: bool) -> range:
    """Those of the steps that count that were taken before an interrupt.

    Raises:
        KeyboardInterrupt: there are none.
    """
    taken = range(max(kept.start, steps - done), kept.stop) if adjoint else range(kept.start, min(kept.stop, done))
    if not taken:
        raise KeyboardInterrupt
    return taken


def _kept_steps(flow: FlowLike, discard: int | None, adjoint: bool) -> range:
    steps = len(flow)
    over_time = flow.over_time and flow.lengths is None
    if discard is None:
        discard = min(_TRANSIENT, steps // 10) if over_time else 0
    ends = discard if adjoint and over_time else 0
    if isinstance(discard, bool) or not isinstance(discard, int) or discard < 0 or discard + ends >= steps:
        raise TraceError(f"discard={discard!r}; expected a whole number of steps that leaves some of the {steps}")
    if adjoint and not over_time:
        return range(0, steps - discard)
    return range(discard, steps - ends)


def _summary(found: SweptFrame, kept: range, lengths: Tensor | None, tolerance: tuple[float, float]) -> dict[str, Any]:
    """Means, errors and flags, over all samples at once where they take the same steps."""
    growth = found.growth
    if lengths is None:
        parts = [_averages(growth[kept.start : kept.stop], tolerance)]
        counts = torch.full((growth.shape[1],), len(kept))
        volumes = None if found.volume is None else found.volume[kept.start : kept.stop].mean(0)
    else:
        stops = [max(kept.start + 1, int(length)) for length in lengths]
        parts = [_averages(growth[kept.start : stop, b : b + 1], tolerance) for b, stop in enumerate(stops)]
        counts = torch.tensor([stop - kept.start for stop in stops])
        for b, length in enumerate(lengths.tolist()):
            growth[int(length) :, b] = math.nan
        volumes = None
        if found.volume is not None:
            volumes = torch.stack([found.volume[kept.start : stop, b].mean() for b, stop in enumerate(stops)])
    merged: dict[str, Any] = {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}
    errors = None if volumes is None else merged["exponents"].sum(1) - volumes
    return {**merged, "local_growth": growth, "steps": counts, "volume_errors": errors}


def _averages(series: Tensor, tolerance: tuple[float, float]) -> dict[str, Tensor]:
    lost = series.isneginf().any(0)
    means = torch.where(lost, math.nan, series.mean(0))
    safe = torch.where(lost, 0.0, series)
    errors = torch.where(lost, math.nan, standard_errors(safe))
    split = torch.where(lost, math.nan, halves(safe))
    return {
        "exponents": means,
        "standard_errors": errors,
        "halves": split,
        "autocorrelation_times": autocorrelation_times(safe, errors),
        "saturated": lost,
        "converged": has_converged(means, errors, split, len(series), *tolerance),
    }


def _sorted(spectrum: LyapunovSpectrum) -> LyapunovSpectrum:
    """The largest exponents first, in every sample; those that are saturated last."""
    order = torch.nan_to_num(spectrum.exponents, -math.inf).argsort(dim=1, descending=True, stable=True)
    if bool((order == torch.arange(order.shape[1])).all()):
        return spectrum
    names = ("exponents", "standard_errors", "autocorrelation_times", "saturated", "converged")
    sorted_ = {name: getattr(spectrum, name).gather(1, order) for name in names}
    growth = spectrum.local_growth.gather(2, order.expand_as(spectrum.local_growth))
    return replace(
        spectrum, **sorted_, local_growth=growth, halves=spectrum.halves.gather(2, order.expand_as(spectrum.halves))
    )


def standard_errors(series: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension, corrected for autocorrelation of either sign.

    Args:
        series: ``(steps, ...)``; see `stabkit.statistics.series_error`.

    Returns:
        A tensor of the remaining shape; NaN for fewer than two steps.
    """
    return torch.from_numpy(np.asarray(series_error(series.detach().double().cpu().numpy())))


def autocorrelation_times(series: Tensor, errors: Tensor) -> Tensor:
    """How many steps carry the information of one independent step: squared error over that of white noise.

    NaN for fewer than two steps.
    """
    if len(series) < 2:
        return torch.full(series.shape[1:], math.nan, dtype=torch.float64)
    white = series.var(0) / len(series)
    return torch.where(white > 0, errors.square() / white, torch.ones_like(white))


def halves(series: Tensor) -> Tensor:
    """Means over the first and the second half, ``(2, ...)``."""
    middle = len(series) // 2
    if not middle:
        return torch.stack([series.mean(0)] * 2)
    return torch.stack([series[:middle].mean(0), series[middle:].mean(0)])


def has_converged(
    means: Tensor, errors: Tensor, split: Tensor, count: Tensor | int, absolute: float, relative: float
) -> Tensor:
    """Whether errors are within a tolerance, and the halves within the errors.

    Args:
        means: the averages.
        errors: their standard errors.
        split: ``(2, ...)``, averages over halves.
        count: how many steps they rest on.
        absolute: allowed error, in nats per step.
        relative: allowed error as a share of the average; the larger of the two counts.
    """
    allowed = torch.clamp(relative * means.abs(), min=absolute)
    rounding = 1e-12 * (1 + means.abs())
    # a half has sqrt(2) times the error of the whole, the difference of two halves 2 times
    agree = (split[0] - split[1]).abs() <= 2 * _APART * errors + rounding
    enough = torch.as_tensor(count) >= _FEWEST
    return (errors <= allowed) & agree & enough & means.isfinite()
