"""Growing an orthonormal basis, block by block, without losing orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor

_DEPENDENT = 50 * torch.finfo(torch.float64).eps
# A pass over the basis multiplies the lack of orthogonality by (part removed) / (part left): passes are repeated until
# that is at most this, which two nearly always achieve ("twice is enough", Kahan, Parlett).
_REMOVED = 0.1
_PASSES = 4


class KrylovBasis:
    """Orthonormal rows V that a Krylov method has multiplied, and after them the block that comes next.

    Args:
        n: length of the rows.
        size: most rows before a restart; ``room`` may hold fewer for a while.
        block: rows multiplied at a time.
        device: the device of the rows.
        seed: the seed of the random start block.
    """

    def __init__(self, n: int, size: int, block: int, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        # rows are written before they are read, and most never: memory that is not touched costs nothing
        self.V = torch.empty(min(n, size + block), n, dtype=torch.float64, device=device)
        self.capacity = self.room = min(n, size)
        self.block = block
        self.size = 0
        self.random_block()

    def random_block(self) -> None:
        """Random directions, orthogonal to the rows that are there, become the next block."""
        n = self.V.shape[1]
        width = min(self.block, n - self.size)
        rows = random_rows(width, n, self.generator, self.V.device)
        self.place(extend(self.V[: self.size], rows, width, self.generator)[2])

    def place(self, block: Tensor) -> None:
        """Orthonormal rows become the next block."""
        self.width = len(block)
        self.V[self.size : self.size + self.width] = block

    @property
    def complete(self) -> bool:
        """The rows span the whole space."""
        return self.size == self.V.shape[1]

    @property
    def full(self) -> bool:
        """The next block does not fit: a restart is due."""
        return self.size + self.width > self.room

    def next_block(self) -> Tensor:
        """The rows to be multiplied next."""
        return self.V[self.size : self.size + self.width]

    def following(self) -> tuple[int, int]:
        """Size of the basis once it has the next block, and the width of the block after that."""
        end = self.size + self.width
        return end, min(self.width, self.V.shape[1] - end)


def random_rows(count: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Gaussian rows ``(count, size)``, drawn on the CPU so that every device gets the same numbers."""
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(device)


def extend(
    basis: Tensor, rows: Tensor, width: int, generator: torch.Generator, recent: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``rows`` into their part in the span of ``basis`` and new orthonormal rows.

    ``rows = C basis + R new``. Where a row depends on the earlier ones, its new direction is a random one
    with a zero in R: an invariant subspace does not end the iteration, and copies of a multiple eigenvalue
    that the start vectors missed come into reach.

    Args:
        basis: ``(p, n)``, orthonormal rows.
        rows: ``(b, n)``.
        width: how many new rows are wanted, ``width <= b`` (fewer where the space is full).
        generator: for the random directions.
        recent: where ``rows`` can have parts along the last ``recent`` rows of ``basis`` only, but for rounding; saves
            a pass over the others.

    Returns:
        C ``(b, p)``, R ``(b, width)``, new ``(width, n)``.
    """
    scales = torch.linalg.vector_norm(rows, dim=1).tolist()
    C, rest, norms = _split(basis, rows, basis.shape[0] if recent is None else min(recent, basis.shape[0]))
    if width == rows.shape[0] and all(r > _DEPENDENT * scale for r, scale in zip(norms, scales, strict=True)):
        if width == 1:
            return C, rest.new_tensor([norms]), rest / norms[0]
        Q, R = torch.linalg.qr(rest.T)
        if all(abs(r) > _REMOVED * norm for r, norm in zip(R.diagonal().tolist(), norms, strict=True)):
            return C, R.T, Q.T
    return C, *_by_columns(basis, rest, width, max(scales, default=0.0), generator)


def _split(basis: Tensor, rows: Tensor, recent: int) -> tuple[Tensor, Tensor, list[float]]:
    """Coefficients along ``basis``, the remainders and their norms."""
    size = basis.shape[0]
    C = rows.new_zeros(rows.shape[0], size)
    part, start, rest = basis[size - recent :], size - recent, rows
    for _ in range(_PASSES):
        removed = rest @ part.T
        rest = torch.addmm(rest, removed, part, alpha=-1)
        C[:, start:] += removed
        norms: list[float] = torch.linalg.vector_norm(rest, dim=1).tolist()
        if start == 0:
            parts = torch.linalg.vector_norm(removed, dim=1).tolist()
            if all(gone <= _REMOVED * norm for gone, norm in zip(parts, norms, strict=True)):
                break
        part, start = basis, 0
    return C, rest, norms


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
