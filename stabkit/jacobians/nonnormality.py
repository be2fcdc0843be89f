"""How far an operator is from normal, and how much its powers can grow while its eigenvalues say they decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.jacobians.counted_products import CountedProducts, as_jacobian, dense_float64
from stabkit.jacobians.krylov_schur import arnoldi
from stabkit.jacobians.lapack import plain_eigenvalues
from stabkit.jacobians.numerical_range import numerical_range, support
from stabkit.jacobians.pseudospectra import (
    Resolvent,
    kreiss_constant,
    pseudospectral_abscissa,
    pseudospectral_radius,
)
from stabkit.jacobians.spectra import eigenvalues, singular_values
from stabkit.operators.jacobian import Jacobian
from stabkit.results import Result
from stabkit.threads import single_threaded

_DENSE = 200
_LARGEST_DENSE = 2000  # a few minutes
_DECOMPOSED = 768  # up to here the spectra of "arnoldi" come from whole decompositions
_FEWEST_PRODUCTS = 100
_UNBOUNDED = 1e100


@dataclass(frozen=True, eq=False)
class NonNormality(Result):
    """Measures of non-normality, one entry per sample; tensors are float64 or complex128 on the CPU.

    With ``method == "dense"`` they belong to the matrix itself. With ``method == "arnoldi"`` eigenvalues, norm and
    numerical abscissa come from iterations on the operator (``nan`` where one did not converge), the numerical
    range and radius, ``kreiss``, ``max_power_norm`` and the pseudospectral radii and abscissae are lower bounds from
    a Krylov space of dimension ``size`` (``nan`` where it does not reach the level), and ``henrici`` is ``nan``.

    Attributes:
        eigenvalues: ``(batch, n)``, or the 6 of largest modulus with ``"arnoldi"``.
        condition_numbers: like ``eigenvalues``, ``1 / |y^H x|`` of each eigenvalue; ``inf`` where defective.
        spectral_radius: ``(batch,)``, max |lambda|.
        spectral_abscissa: ``(batch,)``, max Re lambda.
        norm: ``(batch,)``, the largest singular value.
        numerical_abscissa: ``(batch,)``, the largest eigenvalue of (J + J^T) / 2.
        numerical_radius: ``(batch,)``, max |w| over the numerical range.
        numerical_range: ``(batch, angles)``, boundary points, counterclockwise.
        henrici: ``(batch,)``, ``sqrt(||J||_F^2 - sum |lambda|^2)``, Henrici's departure from normality.
        kreiss: ``(batch,)``, a lower bound of the Kreiss constant of the unit disc; ``inf`` where the spectral
            radius exceeds 1.
        max_power_norm: ``(batch,)``, max ||J^k||_2 over 0 <= k <= ``max_power``.
        max_power_at: ``(batch,)``, the k of that maximum.
        epsilons: ``(e,)``, levels of the pseudospectra, absolute, as the norm of a perturbation of J.
        pseudospectral_radius: ``(batch, e)``.
        pseudospectral_abscissa: ``(batch, e)``.
        method: ``"dense"`` or ``"arnoldi"``.
        n_products: products spent, in vectors per sample.
    """

    eigenvalues: Tensor
    condition_numbers: Tensor
    spectral_radius: Tensor
    spectral_abscissa: Tensor
    norm: Tensor
    numerical_abscissa: Tensor
    numerical_radius: Tensor
    numerical_range: Tensor
    henrici: Tensor
    kreiss: Tensor
    max_power_norm: Tensor
    max_power_at: Tensor
    epsilons: Tensor
    pseudospectral_radius: Tensor
    pseudospectral_abscissa: Tensor
    method: str
    n_products: int

    @property
    def lower_bounds(self) -> tuple[str, ...]:
        """Names of the fields that the true number may exceed."""
        if self.method == "dense":
            return ("kreiss",)
        searched = ("numerical_radius", "kreiss", "max_power_norm")
        return (*searched, "pseudospectral_radius", "pseudospectral_abscissa")

    def _contents(self) -> dict[str, Any]:
        return {**super()._contents(), "lower_bounds": self.lower_bounds}


@accepts
def non_normality(
    J: Jacobian | Tensor | np.ndarray,
    *,
    epsilons: Sequence[float] = (1e-2, 1e-4),
    angles: int = 64,
    max_power: int = 100,
    size: int = 80,
    seed: int = 0,
    method: str = "auto",
    max_products: int = 1000,
) -> NonNormality:
    """Numerical range, Henrici's departure, eigenvalue conditions, Kreiss constant, power growth, pseudospectra.

    Args:
        J: a Jacobian ``(batch, n, n)``, or explicit matrices ``(n, n)`` or ``(batch, n, n)``.
        epsilons: levels of the pseudospectra (absolute).
        angles: directions in which the boundary of the numerical range is sampled.
        max_power: the largest power considered.
        size: dimension of the Krylov space for ``"arnoldi"``.
        seed: the seed of its start block.
        method: ``"dense"`` (cost of order n^3 times a hundred, and refused above n = 2000), ``"arnoldi"`` (lower bounds
            from ``size`` products), or ``"auto"``: dense up to n = 200.
        max_products: the most products with J and J^T, in vectors per sample, that ``"arnoldi"`` spends on the norm,
            the numerical abscissa, the spectral radius and the spectral abscissa, a quarter on each; what has not
            converged by then is nan. All else is made from the ``size`` products of one Krylov space. Up to n = 768
            the four come from whole decompositions, which need n products each.

    Raises:
        ArgumentTypeError: entries are not real floating-point numbers.
        ArgumentError: J is not square or not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> jordan = torch.tensor([[0.9, 1.0], [0.0, 0.9]], dtype=torch.float64)
        >>> result = non_normality(jordan)
        >>> round(result.kreiss.item(), 6), round(result.max_power_norm.item(), 6), result.max_power_at.item()
        (2.6, 3.912567, 9)

    Source: L. N. Trefethen, M. Embree, Spectra and Pseudospectra, Princeton 2005.
    """
    J = as_jacobian(J)
    _, m, n = J.shape
    if m != n:
        raise ArgumentError(f"J has shape {J.shape}: non-normality is defined for square operators only")
    if method not in ("auto", "dense", "arnoldi"):
        raise ArgumentError(f"method={method!r}; expected 'auto', 'dense' or 'arnoldi'")
    for name, value, least in (("angles", angles, 4), ("max_power", max_power, 1), ("size", size, 2)):
        if value < least:
            raise ArgumentError(f"{name}={value}; expected at least {least}")
    if max_products < _FEWEST_PRODUCTS:
        raise ArgumentError(f"max_products={max_products}; expected at least {_FEWEST_PRODUCTS}")
    if method == "dense" and n > _LARGEST_DENSE:
        raise ArgumentError(
            f"method='dense' takes about 100 n^3 = {100 * n**3:.0e} floating-point operations for n = {n}, minutes to "
            f"hours, and is refused above n = {_LARGEST_DENSE}; use method='arnoldi' (lower bounds), or the block of "
            "some coordinates, J.restrict(rows, columns)"
        )
    levels = [float(e) for e in epsilons]
    if not all(0 < e < np.inf for e in levels):
        raise ArgumentError(f"epsilons={tuple(epsilons)}; expected positive numbers")
    if method == "dense" or n <= (size if method == "arnoldi" else _DENSE):
        with single_threaded(n):
            rows = [_measure(A, levels, angles, max_power) for A in dense_float64(J)[0].numpy()]
        return _collect(rows, levels, "dense", n)
    products = CountedProducts(J, None, units="own")
    hessenbergs = arnoldi(products, size, seed)
    edges = _edges(J, seed, max_products)
    with single_threaded(size):
        rows = [
            _measure_projection(H, {name: v[s] for name, v in edges.values.items()}, levels, angles, max_power)
            for s, H in enumerate(hessenbergs)
        ]
    return _collect(rows, levels, "arnoldi", products.count + edges.n_products)


def _measure(A: np.ndarray, levels: list[float], angles: int, max_power: int) -> dict[str, Any]:
    """All measures of one matrix."""
    values, conditions = plain_eigenvalues(A)
    radius = float(np.abs(values).max())
    numerical_abscissa = support(A, 0.0)[0]
    points, numerical_radius = numerical_range(A, angles)
    resolvent = Resolvent(A)
    power_norm, power_at = _largest_power(A, 0, max_power)
    height = float(np.abs(points.imag).max())
    return {
        "eigenvalues": values,
        "condition_numbers": conditions,
        "spectral_radius": radius,
        "spectral_abscissa": float(values.real.max()),
        "norm": resolvent.norm,
        "numerical_abscissa": numerical_abscissa,
        "numerical_radius": numerical_radius,
        "numerical_range": points,
        "henrici": resolvent.departure,
        "kreiss": kreiss_constant(resolvent, radius, numerical_radius),
        "max_power_norm": power_norm,
        "max_power_at": power_at,
        "pseudospectral_radius": [pseudospectral_radius(resolvent, e, values, numerical_radius) for e in levels],
        "pseudospectral_abscissa": [
            pseudospectral_abscissa(resolvent, e, values, numerical_abscissa, height) for e in levels
        ],
    }


@dataclass(frozen=True)
class _Edges:
    """What iterations on the operator itself give, ``(batch, ...)`` each, and the products they took."""

    values: dict[str, np.ndarray]
    n_products: int


def _edges(J: Jacobian, seed: int, max_products: int) -> _Edges:
    n = J.shape[2]
    k, whole = min(6, n), n if n <= _DECOMPOSED else 0
    share = max(max_products // 4, whole)
    modulus = eigenvalues(J, k, "LM", seed=seed, max_products=share)
    right = eigenvalues(J, 1, "LR", seed=seed, max_products=share)
    norm = singular_values(J, 1, seed=seed, max_products=share)
    symmetric = Jacobian(
        J.shape,
        lambda V: (J.matmat(V) + J.rmatmat(V)) / 2,
        lambda U: (J.matmat(U) + J.rmatmat(U)) / 2,
        dtype=J.dtype,
        device=J.device,
        path=J.path,
    )
    # a product with J + J^T is two with J
    hermitian = eigenvalues(symmetric, 1, "LR", seed=seed, max_products=max(max_products // 8, whole))
    unknown = torch.full((J.shape[0],), torch.nan, dtype=torch.float64)
    return _Edges(
        {
            "eigenvalues": modulus.values.numpy(),
            "condition_numbers": modulus.condition_numbers.numpy(),
            "spectral_radius": torch.where(modulus.converged[:, 0], modulus.values[:, 0].abs(), unknown).numpy(),
            "spectral_abscissa": torch.where(right.converged[:, 0], right.values[:, 0].real, unknown).numpy(),
            "norm": norm.values[:, 0].numpy(),
            "numerical_abscissa": torch.where(hermitian.converged[:, 0], hermitian.values[:, 0].real, unknown).numpy(),
        },
        modulus.n_products + right.n_products + norm.n_products + 2 * hermitian.n_products,
    )


def _measure_projection(
    H: np.ndarray, edges: dict[str, Any], levels: list[float], angles: int, max_power: int
) -> dict[str, Any]:
    """Measures of one sample from Arnoldi's rectangular matrix, beside what iterations on J gave (``edges``)."""
    T = H[: H.shape[1]]
    ritz = np.linalg.eigvals(T)
    points, numerical_radius = numerical_range(T, angles)
    resolvent = Resolvent(H)
    radius, norm = float(edges["spectral_radius"]), float(edges["norm"])
    power_norm, power_at = _largest_power(T, 1, max_power)
    height = float(np.abs(points.imag).max())
    return edges | {
        "numerical_radius": max(numerical_radius, float(np.nan_to_num(edges["numerical_abscissa"]))),
        "numerical_range": points,
        "henrici": np.nan,
        "kreiss": kreiss_constant(resolvent, 0.0 if np.isnan(radius) else radius, resolvent.norm),
        "max_power_norm": max(power_norm, norm),
        "max_power_at": power_at if power_norm >= norm else 1,
        "pseudospectral_radius": [pseudospectral_radius(resolvent, e, ritz, resolvent.norm) for e in levels],
        "pseudospectral_abscissa": [
            pseudospectral_abscissa(resolvent, e, ritz, resolvent.norm, height) for e in levels
        ],
    }


def _largest_power(T: np.ndarray, block: int, max_power: int) -> tuple[float, int]:
    """Max ||T^k||_2 and where.

    After ||T^k|| < 1 no later power can exceed the earlier ones. On a projection (``block > 0``) only the columns
    whose k-th power stays in the Krylov space count, which gives a lower bound.
    """
    best, at = 1.0, 0
    power = np.eye(len(T))
    for k in range(1, max_power + 1):
        power = power @ T
        columns = len(T) - k * block
        if columns <= 0:
            break
        part = power[:, :columns] if block else power
        norm = float(np.linalg.norm(part, 2))
        if norm > best * (1 + 1e-12):
            best, at = norm, k
        if (norm < 1 and not block) or norm > _UNBOUNDED:
            break
    return best, at


def _collect(rows: list[dict[str, Any]], levels: list[float], method: str, n_products: int) -> NonNormality:
    columns = {name: torch.from_numpy(np.array([row[name] for row in rows])) for name in rows[0]}
    return NonNormality(
        **columns, epsilons=torch.tensor(levels, dtype=torch.float64), method=method, n_products=n_products
    )
