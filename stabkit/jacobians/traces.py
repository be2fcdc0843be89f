"""Traces, norms, determinants and singular value densities of large operators, estimated from random probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.jacobians.counted_products import CountedProducts, as_jacobian, dense_float64
from stabkit.jacobians.golub_kahan import Bidiagonalisation
from stabkit.operators.jacobian import Jacobian
from stabkit.results import Result
from stabkit.statistics import student_factor

Operator = Jacobian | Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Estimate(Result):
    """A number per sample with its confidence interval, float64 on the CPU.

    Attributes:
        value: ``(batch,)``.
        standard_errors: ``(batch,)``, zero where the value is exact.
        interval: ``(batch, 2)``, lower and upper end at ``confidence``.
        confidence: probability that the interval covers the value, over the probes.
        n_products: products spent, in vectors per sample.
        method: ``"exact"`` or the name of the estimator.
    """

    value: Tensor
    standard_errors: Tensor
    interval: Tensor
    confidence: float
    n_products: int
    method: str


@dataclass(frozen=True, eq=False)
class SingularValueDensity(Result):
    """The distribution of the ``min(m, n)`` singular values: a Gauss rule from every random probe.

    Attributes:
        nodes: ``(batch, probes, steps)``, singular values, ascending.
        weights: ``(batch, probes, steps)``, fractions that sum to 1 for every probe.
        n_products: products spent, in vectors per sample.
    """

    nodes: Tensor
    weights: Tensor
    n_products: int

    def cumulative(self, x: Tensor) -> Tensor:
        """Estimated fraction of singular values up to ``x (q,)``; returns ``(batch, q)``."""
        return self._up_to(x).mean(1)

    def cumulative_interval(self, x: Tensor, confidence: float = 0.95) -> Tensor:
        """Where the fraction of singular values up to ``x (q,)`` lies; returns ``(batch, q, 2)``.

        The distribution that a probe sees runs between the sums of its weights around x (Chebyshev, Markov,
        Stieltjes), whatever the number of steps; Student's interval over the probes is put around these bounds.
        """
        nothing = self.weights.new_zeros(*self.weights.shape[:2], 1)
        sums = torch.cat([nothing, nothing, self.weights.cumsum(-1), nothing + 1], dim=-1)
        below = (self.nodes[:, :, None, :] <= x.to(self.nodes)[None, None, :, None]).sum(-1)
        lower, upper = sums.gather(-1, below), sums.gather(-1, below + 2)
        ends = [_student(lower.movedim(1, -1), confidence)[0], _student(upper.movedim(1, -1), confidence)[1]]
        return torch.stack(ends, dim=-1).clamp(0, 1)

    def density(self, x: Tensor, width: float) -> Tensor:
        """The density at ``x (q,)``, smoothed by a normal of standard deviation ``width``; returns ``(batch, q)``."""
        return self._smooth(x, width).mean(1)

    def density_interval(self, x: Tensor, width: float, confidence: float = 0.95) -> Tensor:
        """Where the smoothed density lies, by Student over the probes; returns ``(batch, q, 2)``.

        The quadrature's own error is not included: it vanishes where the steps resolve ``width``.
        """
        return torch.stack(_student(self._smooth(x, width).movedim(1, -1), confidence), dim=-1)

    def _up_to(self, x: Tensor) -> Tensor:
        below = self.nodes[:, :, None, :] <= x.to(self.nodes)[None, None, :, None]
        fractions: Tensor = (below * self.weights[:, :, None, :]).sum(-1)
        return fractions

    def _smooth(self, x: Tensor, width: float) -> Tensor:
        if not width > 0:
            raise ArgumentError(
                f"width={width}; expected a positive standard deviation, in units of the singular values"
            )
        distances = (x.to(self.nodes)[None, None, :, None] - self.nodes[:, :, None, :]) / width
        bells = torch.exp(-(distances**2) / 2) / (width * (2 * torch.pi) ** 0.5)
        smooth: Tensor = (bells * self.weights[:, :, None, :]).sum(-1)
        return smooth


@accepts
def trace(J: Operator, *, probes: int = 30, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Tr J by Hutch++: exactly on the range of a sketch, by random signs on the rest.

    Args:
        J: a Jacobian ``(batch, n, n)``, or explicit matrices.
        probes: products to spend; a third each for the sketch, its range and the signs. Exact from n on.
        confidence: the confidence level of the interval, from Student's distribution over the signs.
        seed: the seed of the probes.

    Raises:
        ArgumentError: J is not square or not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).value.tolist()
        [6.0]

    Source: R. A. Meyer, C. Musco, C. Musco, D. P. Woodruff, Hutch++ (SOSA 2021).
    """
    J = _checked(J, probes, confidence, square=True)
    n = J.shape[2]
    if probes >= n:
        return _exact(dense_float64(J)[0].diagonal(dim1=1, dim2=2).sum(1), n, confidence)
    products = CountedProducts(J, None)
    third = max(probes // 3, 1)
    S = _signs(third, J, products, seed)
    Q = torch.linalg.qr(products.forward(S).transpose(1, 2))[0].transpose(1, 2)
    inside = (Q * products.forward(Q)).sum((1, 2))
    G = _signs(max(probes - 2 * third, 2), J, products, seed + 1)
    G = G - (G @ Q.transpose(1, 2)) @ Q
    samples = (G * products.forward(G)).sum(2)  # G is already orthogonal to Q: (I - QQ^T) on the left is free
    return _estimate(inside[:, None] + samples, confidence, products.count, "hutch++")


@accepts
def squared_frobenius_norm(J: Operator, *, probes: int = 30, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """||J||_F^2 = E ||J v||^2 over random signs v; exact from ``probes = min(m, n)`` on.

    Arguments and errors as in :func:`trace`; J may be rectangular.

    Example:
        >>> import torch
        >>> squared_frobenius_norm(torch.tensor([[3.0, 4.0]])).value.tolist()
        [25.0]

    Source: M. F. Hutchinson, Commun. Stat. Simul. Comput. 18 (1989) 1059.
    """
    J = _checked(J, probes, confidence, square=False)
    if probes >= min(J.shape[1:]):
        return _exact(dense_float64(J)[0].square().sum((1, 2)), min(J.shape[1:]), confidence)
    return _hutchinson(J, lambda V, p: p.forward(V).square().sum(2), probes, confidence, seed)


@accepts
def trace_of_square(J: Operator, *, probes: int = 30, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Tr J^2 = sum of the squared eigenvalues, from (J^T v) . (J v); two products a probe.

    Arguments and errors as in :func:`trace`.

    Example:
        >>> import torch
        >>> trace_of_square(torch.tensor([[0.0, -1.0], [1.0, 0.0]])).value.tolist()
        [-2.0]
    """
    J = _checked(J, probes, confidence, square=True)
    if 2 * probes >= J.shape[2]:
        dense = dense_float64(J)[0]
        return _exact((dense * dense.transpose(1, 2)).sum((1, 2)), J.shape[2], confidence)
    return _hutchinson(J, lambda V, p: (p.adjoint(V) * p.forward(V)).sum(2), probes, confidence, seed)


@accepts
def log_abs_det(J: Operator, *, probes: int = 10, steps: int = 60, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Log |det J| = sum of log singular values, by stochastic Lanczos quadrature on Golub-Kahan bidiagonals.

    The interval is that of the probes, widened by the change of the quadrature between 3/4 of the steps and all.
    Directions with very small singular values converge slowly: the widened interval then shows it.

    Args:
        J: a Jacobian ``(batch, n, n)``, or explicit matrices.
        probes: random start vectors.
        steps: bidiagonalisation steps for each; every step costs one product with J and one with J^T.
        confidence: the confidence level of the interval.
        seed: the seed of the probes.

    Returns:
        An :class:`Estimate`; exact (LAPACK) where ``2 probes steps >= n``; ``-inf`` for a singular matrix.

    Raises:
        ArgumentError: J is not square or not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> round(log_abs_det(torch.diag(torch.tensor([2.0, -0.5, 1.0]))).value.item(), 12)
        0.0

    Source: S. Ubaru, J. Chen, Y. Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075.
    """
    J = _checked(J, probes, confidence, square=True)
    n = J.shape[2]
    if 2 * probes * steps >= n and n <= 4096:
        return _exact(torch.linalg.slogdet(dense_float64(J)[0])[1], n, confidence)
    products = CountedProducts(J, None)
    runs = _bidiagonals(products, probes, min(steps, n), seed)
    full = np.array([[_log_quadrature(run.B) for run in row] for row in runs]) * n
    part = max(3 * runs[0][0].size // 4, 1)
    short = np.array([[_log_quadrature(run.B[:part, :part]) for run in row] for row in runs]) * n
    estimate = _estimate(torch.from_numpy(full), confidence, products.count, "stochastic lanczos quadrature")
    quadrature = torch.from_numpy(np.abs(full - short).mean(1))
    widened = torch.stack([estimate.interval[:, 0] - quadrature, estimate.interval[:, 1] + quadrature], 1)
    return Estimate(estimate.value, estimate.standard_errors, widened, confidence, products.count, estimate.method)


@accepts
def singular_value_density(J: Operator, *, probes: int = 10, steps: int = 60, seed: int = 0) -> SingularValueDensity:
    """The distribution of all singular values, by stochastic Lanczos quadrature.

    Arguments and errors as in :func:`log_abs_det`; J may be rectangular.

    Example:
        >>> import torch
        >>> density = singular_value_density(torch.eye(5), probes=2)
        >>> [round(v, 6) for v in density.cumulative(torch.tensor([0.9, 1.1]))[0].tolist()]
        [0.0, 1.0]
    """
    J = _checked(J, probes, 0.95, square=False)
    products = CountedProducts(J.T if J.shape[1] < J.shape[2] else J, None)
    runs = _bidiagonals(products, probes, min(steps, *J.shape[1:]), seed)
    rules = [[_quadrature(run.B) for run in row] for row in runs]
    nodes, weights = (np.array([[rule[i][::-1] for rule in row] for row in rules]) for i in (0, 1))
    return SingularValueDensity(torch.from_numpy(nodes), torch.from_numpy(weights), products.count)


def _checked(J: Operator, probes: int, confidence: float, *, square: bool) -> Jacobian:
    J = as_jacobian(J)
    if square and J.shape[1] != J.shape[2]:
        raise ArgumentError(f"J has shape {J.shape}; this quantity is defined for square operators only")
    if probes < 2:
        raise ArgumentError(f"probes={probes}; expected at least 2, an interval needs a spread")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence}; expected a probability between 0 and 1, such as 0.95")
    return J


def _signs(count: int, J: Jacobian, products: CountedProducts, seed: int) -> Tensor:
    """Random signs ``(batch, count, n)``, the same for every sample."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, J.shape[2]), generator=generator).to(torch.float64) * 2 - 1
    return signs.to(products.device).expand(J.shape[0], -1, -1)


def _hutchinson(
    J: Jacobian,
    quadratic: Callable[[Tensor, CountedProducts], Tensor],
    probes: int,
    confidence: float,
    seed: int,
) -> Estimate:
    products = CountedProducts(J, None)
    samples = quadratic(_signs(probes, J, products, seed), products)
    return _estimate(samples, confidence, products.count, "hutchinson")


def _estimate(samples: Tensor, confidence: float, n_products: int, method: str) -> Estimate:
    """Mean, standard error and Student's interval over probes ``(batch, probes)``."""
    samples = samples.cpu()
    error = samples.std(1) / samples.shape[1] ** 0.5
    interval = torch.stack(_student(samples, confidence), 1)
    return Estimate(samples.mean(1), error, interval, confidence, n_products, method)


def _student(samples: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Ends of the interval of the mean over the last dimension."""
    count = samples.shape[-1]
    mean, reach = samples.mean(-1), student_factor(count, confidence) * samples.std(-1) / count**0.5
    return mean - reach, mean + reach


def _exact(value: Tensor, n_products: int, confidence: float) -> Estimate:
    return Estimate(value, torch.zeros_like(value), torch.stack([value, value], 1), confidence, n_products, "exact")


def _bidiagonals(products: CountedProducts, probes: int, steps: int, seed: int) -> list[list[Bidiagonalisation]]:
    """A run from each of ``probes`` start vectors for each sample, all in lock-step."""
    batch, m, n = products.J.shape
    runs = [
        [Bidiagonalisation(m, n, steps, 1, products.device, seed + probe) for probe in range(probes)]
        for _ in range(batch)
    ]
    flat = [run for row in runs for run in row]
    for _ in range(steps):
        V = torch.stack([run.next_block()[0] for run in flat]).reshape(batch, probes, n)
        JV = products.forward(V).reshape(-1, 1, m)
        U = torch.stack([run.forward(image)[0] for run, image in zip(flat, JV, strict=True)])
        JTU = products.adjoint(U.reshape(batch, probes, m)).reshape(-1, 1, n)
        for run, image in zip(flat, JTU, strict=True):
            run.adjoint(image[: run.width])
    return runs


def _quadrature(B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes (singular values) and weights of the start vector's measure."""
    _, nodes, Qt = np.linalg.svd(B)
    return nodes, Qt[:, 0] ** 2


def _log_quadrature(B: np.ndarray) -> float:
    nodes, weights = _quadrature(B)
    with np.errstate(divide="ignore"):
        logs = np.log(nodes)
    return float(np.dot(weights, np.where(weights > 1e-16, logs, 0.0)))
