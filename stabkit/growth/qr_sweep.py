"""A frame of vectors carried along a flow by QR: how much each direction grows, step by step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stabkit.errors import ArgumentError, TraceError
from stabkit.tracing import FlowLike
from stabkit.tracing.protocols import Tangents
from stabkit.walk import wide

_LONGEST_GROUP = 32  # steps multiplied before a QR decomposition
_RESOLVED = 1e-4  # smallest direction over the norm of a product whose directions are still told apart
_SPARE = 3e-2  # the same, where longer products may be tried
# sine of the angle between a column and those before it, below which a frame is made orthonormal
_TIGHTEST = 1 / 30
_WIDE_ANGLE = 0.3
_RANGE = 1e20  # of the squares of lengths; beyond, columns are brought back to unit length


@dataclass(frozen=True)
class Factor:
    """What a stretch of steps does to a frame: ``J ... J Q = Q' R exp(scales)``.

    Attributes:
        steps: the stretch.
        R: ``(batch, k, k)``, upper triangular.
        scales: ``(batch, k)``, natural logs.
    """

    steps: range
    R: Tensor
    scales: Tensor


@dataclass
class SweptFrame:
    """A frame after its way along a flow.

    Attributes:
        growth: ``(steps, batch, k)``, log of how much each direction grew, in nats; -inf where its length was lost in
            rounding.
        frame: ``(batch, n, k)`` orthonormal columns at the end.
        decompositions: how often the frame was made orthonormal.
        volume: ``(steps, batch)``, log |det J|, where it was asked for.
        done: how many steps were taken: all, unless the keyboard interrupted.
    """

    growth: Tensor
    frame: Tensor
    decompositions: int
    volume: Tensor | None
    done: int


def start_frame(flow: FlowLike, k: int, *, adjoint: bool, seed: int, generic: bool = False) -> Tensor:
    """Orthonormal columns ``(batch, n, k)`` where the sweep begins.

    All directions at once start from the unit vectors, which keep triangular systems triangular, unless ``generic``;
    fewer from random ones, which no invariant subspace contains. They are the same for all samples: over a few steps
    the frame matters, and a sample's numbers must not depend on its place in the batch.
    """
    space = flow.space_at(-1 if adjoint else 0)
    dtype = torch.promote_types(flow.dtype, torch.float32)
    if k == space.size and not generic:
        return torch.eye(k, dtype=dtype, device=space.device).expand(space.batch, k, k)
    generator = torch.Generator().manual_seed(seed)
    Q: Tensor = torch.linalg.qr(torch.randn(space.size, k, generator=generator, dtype=dtype))[0]
    return Q.to(space.device).repeat(space.batch, 1, 1)


def propagate(
    flow: FlowLike,
    frame: Tensor,
    *,
    adjoint: bool,
    volume: bool = False,
    on_factor: Callable[[Factor], None] | None = None,
    on_frame: Callable[[Factor, Tensor], None] | None = None,
    every_step: bool = False,
    partial: bool = False,
) -> SweptFrame:
    """Carry a frame along the whole flow.

    Args:
        flow: where.
        frame: orthonormal columns at its beginning, ``(batch, n, k)``; at its end for the adjoint.
        adjoint: from the last step to the first, with transposed Jacobians.
        volume: also take log |det J| of every step; all states must have the size of the frame.
        on_factor: called with every triangular factor, in the order of the sweep.
        on_frame: called with the factor and the orthonormal frame after it.
        every_step: decompose after every single step, so that there is one factor a step.
        partial: when the keyboard interrupts, return what is there; NaN at steps that were not taken.
    """
    batch, _, k = frame.shape
    growth = torch.full((len(flow), batch, k), math.nan, dtype=torch.float64)
    volumes = torch.full((len(flow), batch), math.nan, dtype=torch.float64) if volume else None

    def report(factor: Factor, after: Tensor) -> None:
        if on_factor is not None:
            on_factor(factor)
        if on_frame is not None:
            on_frame(factor, after)

    work = _Sweep(frame, flow.dtype, adjoint, report if on_factor or on_frame else None, every_step)
    done = 0
    try:
        with contextlib.closing(flow.tangents(k, adjoint=adjoint)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                part = slice(piece.steps.start, piece.steps.stop)
                growth[part] = work.over(piece)
                if volumes is not None:
                    volumes[part] = _log_volumes(piece, frame)
                done += len(piece.steps)
        work.finish()
    except KeyboardInterrupt:
        if not partial:
            raise
    return SweptFrame(growth, work.frame, work.decompositions, volumes, done)


def _log_volumes(piece: Tangents, like: Tensor) -> Tensor:
    """Log |det J| of the steps of a piece, ``(steps, batch)``; ``like`` is a frame of all directions."""
    if piece.dense is not None:
        logs: Tensor = torch.linalg.slogdet(wide(piece.dense)).logabsdet
        return logs.cpu()
    eye = torch.eye(like.shape[2], dtype=like.dtype, device=like.device).expand_as(like)
    images = piece.multiply(eye) if piece.multiply is not None else eye
    logs = torch.linalg.slogdet(wide(images)).logabsdet
    return logs.cpu().unsqueeze(0)


def _not_finite(step: int) -> str:
    return (
        f"the Jacobian of step {step} has nan or infinite entries: check the inputs and the parameters with "
        "torch.isfinite, or use a wider dtype"
    )


@dataclass
class _Sweep:
    """A frame on its way. Between two QR decompositions it is only kept at unit length, column by column."""

    frame: Tensor
    dtype: torch.dtype
    adjoint: bool
    report: Callable[[Factor, Tensor], None] | None
    every_step: bool
    decompositions: int = 0
    _group: int = 8
    _pending: range | None = None
    _R: Tensor = field(default_factory=lambda: torch.empty(0))
    _scales: Tensor = field(default_factory=lambda: torch.empty(0))
    _logs: Tensor = field(default_factory=lambda: torch.empty(0))
    _angle: float = 1.0

    @property
    def rounding(self) -> float:
        """Below this share of its length a direction is rounding."""
        return min(0.02, 4 * math.sqrt(self.frame.shape[1]) * torch.finfo(self.dtype).eps)

    def over(self, piece: Tangents) -> Tensor:
        """Growth ``(steps, batch, k)`` over the steps of a piece.

        Raises:
            TraceError: a Jacobian is not finite.
        """
        if piece.multiply is not None:
            return self.single(piece.multiply, piece.steps).cpu().unsqueeze(0)
        if piece.dense is None:
            raise ArgumentError("tangents come as products or as Jacobians; these are neither")
        J = wide(piece.dense).cpu()
        if not bool(J.isfinite().all()):
            raise TraceError(_not_finite(int((~J.isfinite()).flatten(1).any(1).nonzero()[0]) + piece.steps.start))
        return self.windows(J, piece.steps)

    def windows(self, J: Tensor, steps: range) -> Tensor:
        """Growth ``(steps, batch, k)`` over explicit Jacobians, several steps to a QR decomposition.

        The frames at the ends of the groups are found first, one group after the other; then the steps inside are
        decomposed, in all groups at once. The growth of every step is that of a QR after every step.
        """
        if self.adjoint:
            J = J.mT.flip(0)
        parts, here = [], 0
        while here < len(J):
            group = 1 if self.every_step else min(self._group, len(J) - here)
            count = (len(J) - here) // group
            grouped = J[here : here + count * group].reshape(count, group, *J.shape[1:])
            starts = self._coarse(grouped, steps, here)
            if starts is None:
                continue
            parts.append(self._fine(grouped, starts))
            here += count * group
        growth = torch.cat(parts)
        return growth.flip(0) if self.adjoint else growth

    def _coarse(self, grouped: Tensor, steps: range, offset: int) -> Tensor | None:
        """The frames ``(groups, batch, n, k)`` before each group; None when the groups were too long."""
        count, group = grouped.shape[:2]
        products = grouped[:, 0]
        for index in range(1, group):
            products = grouped[:, index] @ products
        norms = torch.linalg.matrix_norm(products)
        frame = self.frame.cpu().to(torch.float64)
        frames, factors = [frame], []
        for product in products:
            frame, R = torch.linalg.qr(product @ frame)
            frames.append(frame)
            factors.append(R)
        stacked = torch.stack(factors)
        smallest = stacked.diagonal(dim1=-2, dim2=-1).abs().amin(-1) / norms
        resolution = float(torch.nan_to_num(smallest, 0.0).min())
        if group > 1 and not resolution > _RESOLVED:
            self._group = max(1, group // 2)
            return None
        if resolution > _SPARE and group == self._group:
            self._group = min(_LONGEST_GROUP, 2 * group)
        self.frame = frames[-1]
        self.decompositions += count
        if self.report is not None:
            zeros = torch.zeros(stacked.shape[1:-1], dtype=torch.float64)
            for index, R in enumerate(factors):
                low = offset + index * group
                here = steps[low : low + group]
                if self.adjoint:
                    here = steps[len(steps) - low - group : len(steps) - low]
                self.report(Factor(here, R, zeros), frames[index + 1])
        return torch.stack(frames[:-1])

    def _fine(self, grouped: Tensor, frames: Tensor) -> Tensor:
        parts = []
        for index in range(grouped.shape[1]):
            images = grouped[:, index] @ frames
            lengths = torch.linalg.vector_norm(images, dim=-2)
            frames, R = torch.linalg.qr(images)
            parts.append(self._log(R.diagonal(dim1=-2, dim2=-1).abs(), lengths))
        return torch.stack(parts, dim=1).flatten(0, 1)

    def _log(self, diagonal: Tensor, lengths: Tensor) -> Tensor:
        lost = diagonal <= self.rounding * lengths
        return torch.where(lost, torch.full_like(diagonal, -math.inf), diagonal.log())

    def single(self, multiply: Callable[[Tensor], Tensor], steps: range) -> Tensor:
        """Growth ``(batch, k)`` over one step that is known by its products."""
        unit = multiply(self.frame)
        unit = unit.to(torch.promote_types(unit.dtype, torch.float32))
        if self._pending is None:
            self._scales = self._logs = torch.zeros((), dtype=torch.float64)
            self._pending, self._angle = steps, 1.0
        else:
            self._pending = range(min(self._pending.start, steps.start), max(self._pending.stop, steps.stop))
        # in float32 a frame that is far from degenerate has no digits that a Gram matrix in float64 would save
        quick = unit.dtype == torch.float32 and self._angle > _WIDE_ANGLE
        gram = _gram(unit, quick)
        if gram is None:
            unit, lengths = _at_unit_length(unit, steps)
            self._scales = self._scales + lengths.log()
            gram = wide(unit).mT @ wide(unit)
        frame, R, diagonal, angle = _decomposed(unit, gram)
        if quick and angle < _WIDE_ANGLE:
            frame, R, diagonal, angle = _decomposed(unit, wide(unit).mT @ wide(unit))
        logs = self._scales + diagonal.log()
        growth = logs - self._logs
        if not angle > self.rounding:
            lengths = torch.linalg.vector_norm(wide(unit), dim=1)
            growth[diagonal <= self.rounding * lengths] = -math.inf
        self.frame, self._R, self._logs = unit if frame is None else frame, R, logs
        predicted = angle * min(1.0, angle / self._angle)
        self._angle = angle
        if frame is not None or self.every_step or predicted < _TIGHTEST:
            self._orthonormalise(frame)
        return growth

    def _orthonormalise(self, Q: Tensor | None) -> None:
        if self._pending is None:
            return
        if Q is None:
            Q = torch.linalg.solve_triangular(self._R.to(self.frame), self.frame, upper=True, left=False)
        self.frame = Q
        self.decompositions += 1
        if self.report is not None:
            self.report(Factor(self._pending, self._R, self._scales.expand(self._R.shape[:-1])), Q)
        self._pending = None

    def finish(self) -> None:
        """Leave an orthonormal frame behind."""
        self._orthonormalise(None)


def _gram(columns: Tensor, quick: bool) -> Tensor | None:
    """The Gram matrix in float64, None where squares of lengths come near the ends of the range of a float."""
    exact = columns if quick else wide(columns)
    gram = (exact.mT @ exact).to(torch.float64)
    low, high = torch.aminmax(gram.diagonal(dim1=-2, dim2=-1))
    return gram if float(low) > 1 / _RANGE and float(high) < _RANGE else None


def _at_unit_length(columns: Tensor, steps: range) -> tuple[Tensor, Tensor]:
    """Columns at unit length, and their lengths in float64."""
    exact = wide(columns)
    lengths = torch.linalg.vector_norm(exact, dim=1)  # without overflow or underflow of the squares
    if not bool(lengths.isfinite().all()):
        raise TraceError(_not_finite(steps.start))
    return (exact / lengths.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)).to(columns), lengths


def _decomposed(columns: Tensor, gram: Tensor) -> tuple[Tensor | None, Tensor, Tensor, float]:
    """R by Cholesky, and Q too, by Householder, where columns are too close to each other for that.

    Also the diagonal of R, and the smallest sine of the angle between a column and those before it.
    """
    R, failed = torch.linalg.cholesky_ex(gram, upper=True)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    angle = float((diagonal.square() / squares).min()) ** 0.5 if not bool(failed.any()) else 0.0
    if angle > (1e-2 if columns.dtype == torch.float64 else 3e-3):
        return None, R, diagonal, angle
    Q, R = torch.linalg.qr(wide(columns))
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    sines = diagonal / squares.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return Q.to(columns), R, diagonal, float(sines.min())
