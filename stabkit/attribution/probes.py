"""What a step makes of test cotangents: a whole basis where that is cheap, random signs where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.attribution.after_addition import Tail, pull_through
from stabkit.tracing import Step

_BYTES = 2**28  # test cotangents that are pulled back at once
_KEPT_BYTES = 2**28  # images of one step that are kept to compare them with its neighbour's


@dataclass(frozen=True)
class Images:
    """What a step makes of test cotangents, float64 on the CPU.

    Attributes:
        exact: whether the cotangents are a basis; otherwise they are random signs.
        pulled: ``(samples, n, k)``, J^T v.
        tail: ``(samples, m, k)``, T^T v, where T follows the addition; v itself where nothing does.
        factors: energies ``(samples, k)`` after each operation of the tail, last operation first.
    """

    exact: bool
    pulled: Tensor
    tail: Tensor
    factors: tuple[tuple[str, Tensor], ...]

    @property
    def J(self) -> Tensor:
        """The matrices ``(samples, m, n)``; only where the cotangents are a basis."""
        return self.pulled.transpose(1, 2)

    def tail_rates(self, size: int) -> dict[str, Tensor]:
        """``(samples,)`` under ``"mask"`` and ``"norm"``: by how much the tail alone changes the isotropic rate."""
        before = torch.full((self.pulled.shape[0],), float(size), dtype=torch.float64)
        rates = {"mask": torch.zeros_like(before), "norm": torch.zeros_like(before)}
        for kind, per_probe in self.factors:
            after = per_probe.sum(1) if self.exact else per_probe.mean(1)
            rates[kind] = rates[kind] + 0.5 * (after / before).log()
            before = after
        return rates

    def mean(self, cotangents: Tensor) -> Tensor:
        """``(samples,)``, the mean eigenvalue tr J / d of a step that keeps its space, from the test cotangents."""
        return (self.pulled * cotangents).sum((1, 2)) / (self.pulled.shape[2] if self.exact else cotangents[0].numel())

    def deviation(self, cotangents: Tensor) -> Tensor:
        """``(samples, n, k)``, images under J less its mean eigenvalue; as many as memory allows to keep."""
        away = self.pulled - self.mean(cotangents)[:, None, None] * cotangents
        samples, n, k = away.shape
        if self.exact:
            return away
        return away[:, :, : max(1, min(k, _KEPT_BYTES // (8 * samples * n)))].clone()


def basis_images(step: Step, tail: Tail | None, matrix: Tensor, samples: int) -> Images:
    """The images of a basis of the target's space: the matrix J itself, ``(samples, m, n)`` or more samples."""
    pulled, m = matrix.transpose(1, 2), matrix.shape[1]
    eye = torch.eye(m, dtype=pulled.dtype, device=pulled.device).expand(step.target.space.batch, m, m)
    through, factors = (eye, []) if tail is None else pull_through(tail, step, eye)
    return Images(True, _collect(pulled, samples), _collect(through, samples), _sliced(factors, samples))


def random_images(step: Step, tail: Tail | None, samples: int, count: int, seed: int) -> Images:
    """The images of ``count`` vectors of random signs, the same for every sample and for every step of this size."""
    J = step.jacobian()
    batch, m, _ = J.shape
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, (m, count), generator=generator) * 2 - 1).to(J.dtype).to(J.device)
    chunk = max(1, min(count, _BYTES // (8 * batch * m)))
    parts = []
    for start in range(0, count, chunk):
        V = signs[:, start : start + chunk].expand(batch, -1, -1)
        pulled = J.rmatmat(V)
        through, factors = (V, []) if tail is None else pull_through(tail, step, V)
        parts.append((_collect(pulled, samples), _collect(through, samples), _sliced(factors, samples)))
    joined = tuple(
        (parts[0][2][i][0], torch.cat([part[2][i][1] for part in parts], 1)) for i in range(len(parts[0][2]))
    )
    return Images(False, torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2), joined)


def _collect(columns: Tensor, samples: int) -> Tensor:
    return columns[:samples].detach().to(device="cpu", dtype=torch.float64)


def _sliced(factors: list[tuple[str, Tensor]], samples: int) -> tuple[tuple[str, Tensor], ...]:
    return tuple((kind, energy[:samples].cpu()) for kind, energy in factors)
