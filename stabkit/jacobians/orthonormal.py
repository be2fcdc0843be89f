"""Growing an orthonormal basis, block by block, without losing orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor

_DEPENDENT = 50 * torch.finfo(torch.float64).eps


def random_rows(count: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Gaussian rows ``(count, size)``, drawn on the CPU so that every device gets the same numbers."""
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(device)


def extend(basis: Tensor, rows: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``rows`` into their part in the span of ``basis`` and new orthonormal rows.

    ``rows = C basis + R new``. Where a row depends on the earlier ones, its new direction is a random one
    with a zero in R: an invariant subspace does not end the iteration, and copies of a multiple eigenvalue
    that the start vectors missed come into reach.

    Args:
        basis: ``(p, n)``, orthonormal rows.
        rows: ``(b, n)``.
        width: how many new rows are wanted, ``width <= b`` (fewer where the space is full).
        generator: for the random directions.

    Returns:
        C ``(b, p)``, R ``(b, width)``, new ``(width, n)``.
    """
    if len(rows) == 1 and width == 1:
        return _extend_by_one(basis, rows[0], generator)
    scale = torch.linalg.vector_norm(rows, dim=1)
    C = rows @ basis.T
    rest = rows - C @ basis
    correction = rest @ basis.T  # "twice is enough" (Kahan, Parlett)
    C, rest = C + correction, rest - correction @ basis
    if width == len(rows):
        Q, R = torch.linalg.qr(rest.T)
        if bool((R.diagonal().abs() > _DEPENDENT * scale).all()):
            return C, R.T.contiguous(), Q.T.contiguous()
    return C, *_by_columns(basis, rest, width, float(scale.max()), generator)


def _extend_by_one(basis: Tensor, row: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The common case without the cost of a QR decomposition."""
    C = basis @ row
    rest = row - basis.T @ C
    correction = basis @ rest
    rest -= basis.T @ correction
    norm = torch.linalg.vector_norm(rest)
    if float(norm) > _DEPENDENT * float(torch.linalg.vector_norm(row)):
        return (C + correction)[None], norm.reshape(1, 1), (rest / norm)[None]
    direction = random_rows(1, len(row), generator, row.device)[0]
    return (C + correction)[None], torch.zeros_like(norm).reshape(1, 1), _purge(direction, basis, basis[:0])[None]


def _by_columns(
    basis: Tensor, rest: Tensor, width: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt on the rows of ``rest``, the largest remainder first, random rows once all depend."""
    new = rest.new_zeros(0, rest.shape[1])
    rest = rest.clone()
    R = rest.new_zeros(len(rest), width)
    for j in range(width):
        norms = torch.linalg.vector_norm(rest, dim=1)
        pick = int(norms.argmax())
        if float(norms[pick]) > _DEPENDENT * scale:
            direction = _purge(rest[pick] / norms[pick], basis, new)
            R[:, j] = rest @ direction
            rest = rest - torch.outer(R[:, j], direction)
            rest[pick] = 0
        else:
            direction = _purge(random_rows(1, rest.shape[1], generator, rest.device)[0], basis, new)
        new = torch.cat([new, direction[None]])
    return R, new


def _purge(vector: Tensor, basis: Tensor, new: Tensor) -> Tensor:
    for _ in range(3):
        vector = vector - basis.T @ (basis @ vector)
        vector = vector - new.T @ (new @ vector)
        vector = vector / torch.linalg.vector_norm(vector)
    return vector
