"""Products with the Jacobian of a segment, per sample, in flat coordinates, each forward product certified."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stabkit.errors import TraceError
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Meta
from stabkit.tracing.products.segments import Segment

_DENSE_BYTES = 2**30  # the largest Jacobian that is built only to multiply with it


class Space:
    """Flat coordinates of a state: ``(batch, size)`` columns for its tuple of tensors.

    Complex tensors count as pairs of real coordinates.

    Args:
        metas: shape, dtype and device of the tensors.
        layouts: how each tensor's entries belong to the samples.
    """

    def __init__(self, metas: Sequence[Meta], layouts: Sequence[Layout]) -> None:
        self.metas = tuple(metas)
        self.layouts = tuple(layouts)
        self.batch = layouts[0].batch if layouts else 1
        self.sizes = [
            meta.numel // layout.batch * (2 if meta.dtype.is_complex else 1)
            for meta, layout in zip(metas, layouts, strict=True)
        ]
        self.size = sum(self.sizes)
        self.dtype = torch.float32
        for index, meta in enumerate(metas):
            real = meta.dtype.to_real() if meta.dtype.is_complex else meta.dtype
            self.dtype = real if index == 0 else torch.promote_types(self.dtype, real)
        self.device = metas[0].device if metas else torch.device("cpu")

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of one sample."""
        return tuple(layout.sample_shape(meta.shape) for meta, layout in zip(self.metas, self.layouts, strict=True))

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes in which the flat coordinates run: those of one sample, with an axis of two for complex numbers."""
        pairs = ((2,) if meta.dtype.is_complex else () for meta in self.metas)
        return tuple((*shape, *pair) for shape, pair in zip(self.sample_shapes, pairs, strict=True))

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stacked tensors ``(k, *shape)`` to columns ``(batch, size, k)``, which stay rows in memory."""
        parts = []
        for tensor, meta, layout in zip(tensors, self.metas, self.layouts, strict=True):
            columns = layout.columns(tensor.movedim(0, -1), meta.shape)
            if meta.dtype.is_complex:
                columns = torch.view_as_real(columns.movedim(1, -1).resolve_conj()).flatten(-2).movedim(-1, 1)
            parts.append(columns.to(self.dtype))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.transpose(1, 2) for part in parts], dim=2).transpose(1, 2)

    def unflatten(self, columns: Tensor) -> list[Tensor]:
        """Columns ``(batch, size, k)`` to stacked tensors ``(k, *shape)``."""
        tensors = []
        for part, meta, layout in zip(torch.split(columns, self.sizes, dim=1), self.metas, self.layouts, strict=True):
            if meta.dtype.is_complex:
                pairs = part.movedim(1, -1).to(meta.dtype.to_real())
                part = torch.complex(pairs[..., 0::2].contiguous(), pairs[..., 1::2].contiguous()).movedim(-1, 1)
            # each vector contiguous: kernels of the backward pass would otherwise copy it, one after the other
            tensors.append(layout.tensor(part, meta.shape).movedim(-1, 0).to(meta.dtype).contiguous())
        return tensors


class Products:
    """J V and J^T U of one segment, with the way in which the forward product is made.

    A forward product comes from the double VJP of the recorded nodes. Some operations lack a second derivative, and
    some hand-written backwards return a wrong one without an error; so each way must first pass
    <w, J u> = <J^T w, u> on random pairs, and otherwise the next way is taken.
    """

    def __init__(self, segment: Segment, source: Space, target: Space) -> None:
        self.segment = segment
        self.source = source
        self.target = target
        self._forward: Callable[[Tensor], Tensor] | None = None
        self._dense: Tensor | None = None
        self.path = "vjp"
        self.attempts: list[str] = []

    def backward(self, columns: Tensor) -> Tensor:
        """J^T U: ``(batch, m, k) -> (batch, n, k)``."""
        return self.source.flatten(self.segment.vjp_batch(self.target.unflatten(columns)))

    def forward(self, columns: Tensor) -> Tensor:
        """J V: ``(batch, n, k) -> (batch, m, k)``."""
        if self._forward is None:
            self._forward = self._certified()
        return self._forward(columns)

    def _certified(self) -> Callable[[Tensor], Tensor]:
        ways = [("double vjp", self._double_vjp), ("dense from vjp", self._from_dense)]
        for name, way in ways:
            try:
                error = self._dot_error(way)
            except (TraceError, RuntimeError, NotImplementedError) as failure:
                self.attempts.append(f"{name}: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}")
                self.segment.release()
                continue
            self.attempts.append(f"{name}: <w, J u> = <J^T w, u> to {error:.1e}")
            # a dense Jacobian is transposed exactly: what is left is noise of the backward itself, say of a solver
            if error <= max(self.tolerance(), 1e-6 if way == self._from_dense else 0.0):
                self.path = name
                return way
        raise TraceError(
            f"no forward product of this step could be certified ({'; '.join(self.attempts)}); "
            "products with the transpose, J.T @ U, are exact and available"
        )

    def _double_vjp(self, columns: Tensor) -> Tensor:
        return self.target.flatten(self.segment.jvp_batch(self.source.unflatten(columns)))

    def _from_dense(self, columns: Tensor) -> Tensor:
        size = self.target.batch * self.target.size * self.source.size * self.target.dtype.itemsize
        if size > _DENSE_BYTES:
            raise NotImplementedError(f"a dense Jacobian would take {size / 2**30:.1f} GiB")
        if self._dense is None:
            self._dense = self._rows()
        return self._dense.to(columns.dtype) @ columns

    def _rows(self) -> Tensor:
        """The Jacobian itself, row by row from the transposed products."""
        eye = torch.eye(self.target.size, dtype=self.target.dtype, device=self.target.device)
        blocks = [self.backward(part.expand(self.target.batch, -1, -1)) for part in torch.split(eye, 64, dim=1)]
        return torch.cat(blocks, dim=2).transpose(1, 2)

    def _dot_error(self, way: Callable[[Tensor], Tensor]) -> float:
        """The largest relative difference of the two sides over the samples, on two random pairs at once."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(self.source.batch, self.source.size, 2, generator=generator).to(self.source.device)
        w = torch.randn(self.target.batch, self.target.size, 2, generator=generator).to(self.target.device)
        ju = way(u.to(self.source.dtype)).double()
        jw = self.backward(w.to(self.target.dtype)).double()
        left, right = (w.double() * ju).sum(1), (u.double() * jw).sum(1)
        scale = torch.maximum(_norms(w) * _norms(ju), _norms(u) * _norms(jw))
        error = ((left - right).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max()
        return float(error) if bool(error.isfinite()) else 0.0 if not bool(jw.isfinite().all()) else float("inf")

    def tolerance(self) -> float:
        """The relative error allowed, by the coarsest dtype inside.

        A float64 model may well cast to float32 in its norms and softmax.
        """
        metas = [*self.source.metas, *self.target.metas]
        dtypes = {meta.dtype for meta in metas} | self.segment.dtypes()
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        return max(1e-9, 200 * eps)


def _norms(columns: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(columns.double(), dim=1)
    return norms
