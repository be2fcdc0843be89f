"""One weight matrix: its spectrum, its scale, and the growth that random weights of this scale would have."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.jacobians import eigenvalues, from_dense, singular_values
from stabkit.meanfield import fixed_point
from stabkit.results import Result
from stabkit.weights.roles import Role

_DENSE = 512  # up to here all singular values are computed
_DENSE_EIGENVALUES = 1024
_TOLERANCE = 1e-4
_PRODUCTS = 300
_LARGEST_EIGENVALUES = 6


@dataclass(frozen=True)
class MatrixReport(Result):
    r"""What one stored matrix says by itself.

    Attributes:
        name: its name in the file.
        shape: as stored.
        dtype: as stored.
        kind: ``"matrix"``, ``"convolution"``, ``"recurrent"`` or ``"embedding"``.
        finite: whether every entry is finite; without it there are no other numbers.
        norm: Frobenius norm.
        mean: mean of the entries.
        fan_in: numbers that each output sums over.
        sigma_w: root mean square of the entries times the root of the fan-in: 1 keeps the size of a random vector.
        sigma_b: root mean square of the bias beside it, 0 without one.
        largest_singular_value: the worst growth in one application.
        smallest_singular_value: None when only the largest was computed.
        stable_rank: squared Frobenius norm over squared largest singular value, from 1 to the rank.
        singular_values: all of them, largest first; only the largest one where the matrix is large.
        method: ``"dense"`` or ``"golub-kahan"``.
        converged: whether every value above has converged.
        eigenvalues: the eigenvalues of a recurrent matrix, block by block as in ``gates``.
        gates: names of the blocks.
        spectral_radius: largest \|eigenvalue\| over the blocks.
        linear_growth: log sigma_w, nats: growth of the norm of a random cotangent through the matrix alone.
        expected_growth: the expected growth of a gradient through this layer with the activation, were its weights
            random: half the log of chi_1 at the fixed point of the variance, nats. None for an embedding.
        phase: ``"ordered"``, ``"critical"`` or ``"chaotic"``, of a deep network of such layers.
        notes: what was assumed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    finite: bool
    fan_in: int
    norm: float = math.nan
    mean: float = math.nan
    sigma_w: float = math.nan
    sigma_b: float = 0.0
    largest_singular_value: float = math.nan
    smallest_singular_value: float | None = None
    stable_rank: float = math.nan
    singular_values: tuple[float, ...] = ()
    method: str = "none"
    converged: bool = False
    eigenvalues: tuple[tuple[complex, ...], ...] = ()
    gates: tuple[str, ...] = ()
    spectral_radius: float | None = None
    linear_growth: float | None = None
    expected_growth: float | None = None
    phase: str | None = None
    notes: tuple[str, ...] = ()


def measure(name: str, tensor: Tensor, role: Role, bias: Tensor | None, activation: str, seed: int) -> MatrixReport:
    """Everything that one matrix says.

    Args:
        name: its name.
        tensor: its entries.
        role: from :func:`stabkit.weights.roles.role_of`.
        bias: the bias beside it.
        activation: the nonlinearity that is assumed to stand before or behind it.
        seed: the seed of the iteration for a large matrix.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    described: dict[str, Any] = {
        "name": name,
        "shape": tuple(tensor.shape),
        "dtype": dtype,
        "kind": role.kind,
        "fan_in": role.fan_in,
    }
    W = tensor.detach().flatten(1)
    if W.dtype.itemsize < 4 or not W.is_contiguous():
        W = W.float().contiguous()
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(W)):
        return MatrixReport(**described, finite=False, notes=("NaN or infinity in its entries",))
    W = W.T if role.transposed else W
    norm = float(torch.linalg.vector_norm(W))
    sigma_w = norm / math.sqrt(W.shape[0])
    sigma_b = _root_mean_square(bias)
    largest, found, method, converged, notes = _singular_values(W, seed)
    blocks, radius, sure = _eigenvalues(W, len(role.gates), seed)
    growth = None if role.kind == "embedding" else _expected(activation, sigma_w, sigma_b)
    return MatrixReport(
        **described,
        finite=True,
        norm=norm,
        mean=float(W.mean()),
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        largest_singular_value=largest,
        smallest_singular_value=found[-1] if method == "dense" else None,
        stable_rank=(norm / largest) ** 2 if largest > 0 else 0.0,
        singular_values=found,
        method=method,
        converged=converged and sure,
        eigenvalues=blocks,
        gates=role.gates,
        spectral_radius=radius,
        linear_growth=None if role.kind == "embedding" else _log(sigma_w),
        expected_growth=None if growth is None else growth[0],
        phase=None if growth is None else growth[1],
        notes=(*role.notes, *notes),
    )


def _singular_values(W: Tensor, seed: int) -> tuple[float, tuple[float, ...], str, bool, tuple[str, ...]]:
    """Largest value, values, method, converged, notes."""
    if min(W.shape) <= _DENSE:
        values = tuple(torch.linalg.svdvals(W.double()).tolist())
        return values[0], values, "dense", True, ()
    found = singular_values(
        from_dense(W[None]), 1, tol=_TOLERANCE, seed=seed, method="golub-kahan", max_products=_PRODUCTS
    )
    value, converged = float(found.values[0, 0]), bool(found.converged[0, 0])
    residual = float(found.residuals[0, 0])
    notes = () if converged else (f"the largest singular value has not converged (residual {residual:.1e})",)
    return value, (value,), "golub-kahan", converged, notes


def _eigenvalues(W: Tensor, count: int, seed: int) -> tuple[tuple[tuple[complex, ...], ...], float | None, bool]:
    """Eigenvalues of every square block of a recurrent matrix, the largest modulus, and whether all are sure."""
    if count == 0:
        return (), None, True
    blocks, sure = [], True
    for block in W.chunk(count):
        if block.shape[0] <= _DENSE_EIGENVALUES:
            blocks.append(tuple(torch.linalg.eigvals(block.double()).tolist()))
            continue
        found = eigenvalues(
            from_dense(block[None]),
            _LARGEST_EIGENVALUES,
            tol=_TOLERANCE,
            seed=seed,
            method="krylov-schur",
            max_products=_PRODUCTS,
            two_sided=False,
        )
        sure = sure and bool(found.converged.all())
        blocks.append(tuple(found.values[0].tolist()))
    return tuple(blocks), max(abs(z) for block in blocks for z in block), sure


@functools.lru_cache(maxsize=4096)
def _expected(activation: str, sigma_w: float, sigma_b: float) -> tuple[float, str]:
    found = fixed_point(activation, sigma_w=sigma_w, sigma_b=sigma_b)
    return found.exponent, found.phase


def _root_mean_square(bias: Tensor | None) -> float:
    if bias is None or bias.numel() == 0 or not bias.is_floating_point():
        return 0.0
    value = float(torch.linalg.vector_norm(bias.detach().double())) / math.sqrt(bias.numel())
    return value if math.isfinite(value) else 0.0


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
