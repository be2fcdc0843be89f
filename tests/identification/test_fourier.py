"""Splittings one part of which is linear and taken in Fourier space."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

H, WIDTH = 0.1, 8


class Split(nn.Module):
    """Rounds of a field and of diffusion."""

    def __init__(self, order: str, rounds: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.nu, self.order, self.rounds = nn.Parameter(torch.tensor(0.5)), order, rounds

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            x = getattr(self, self.order)(x)
        return x

    def react(self, x: Tensor, h: float) -> Tensor:
        return x + h * self.net(x)

    def diffuse(self, x: Tensor, h: float, kind: str = "solve") -> Tensor:
        rate = h * self.nu * torch.arange(WIDTH // 2 + 1, dtype=x.dtype) ** 2
        u = torch.fft.rfft(x)
        u = (
            u / (1 + rate)
            if kind == "solve"
            else u * (1 - rate / 2) / (1 + rate / 2)
            if kind == "cn"
            else u / (0.5 + rate)
        )
        return torch.fft.irfft(u, n=WIDTH)

    def lie(self, x: Tensor) -> Tensor:
        return self.diffuse(self.react(x, H), H)

    def together(self, x: Tensor) -> Tensor:
        rate = H * self.nu * torch.arange(WIDTH // 2 + 1, dtype=x.dtype) ** 2
        u, f = torch.fft.rfft(x), torch.fft.rfft(self.net(x))
        return torch.fft.irfft((u + H * f) / (1 + rate), n=WIDTH)

    def crank_nicolson(self, x: Tensor) -> Tensor:
        return self.diffuse(self.react(x, H), H, "cn")

    def filtered(self, x: Tensor) -> Tensor:
        return self.diffuse(self.react(x, H), H, "filter")

    def midpoint(self, x: Tensor) -> Tensor:
        return self.diffuse(x + H * self.net(self.react(x, H / 2)), H)

    def strang(self, x: Tensor) -> Tensor:
        return self.react(self.diffuse(self.react(x, H / 2), H), H / 2)

    def strang_outside(self, x: Tensor) -> Tensor:
        return self.diffuse(self.react(self.diffuse(x, H / 2), H), H / 2)

    def uneven(self, x: Tensor) -> Tensor:
        return self.diffuse(self.react(self.diffuse(x, 0.3 * H), H), 0.7 * H)


def read(order: str) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    return identify(trace(Split(order).double(), torch.randn(3, WIDTH, dtype=torch.float64)), checks=False)


@pytest.mark.parametrize(
    ("order", "name", "evidence"),
    [
        ("lie", "semi-implicit Euler (linear solve)", "proven"),
        ("together", "semi-implicit Euler (linear solve)", "proven"),
        ("crank_nicolson", "Lie splitting (Euler, trapezoid)", "proven"),
        ("midpoint", "Lie splitting (midpoint, backward Euler)", "proven"),
        ("strang", "Strang-ordered splitting (Euler, backward Euler, Euler)", "proven"),
        ("strang_outside", "Strang-ordered splitting (backward Euler, Euler, backward Euler)", "proven"),
        ("uneven", "Lie splitting (backward Euler, Euler, backward Euler)", "proven"),
        ("filtered", "linear map behind the addition", "proven"),
    ],
)
def test_a_division_between_transforms_is_a_linear_solve(order: str, name: str, evidence: str):
    assert [(r.name, r.evidence) for r in read(order)] == [(name, evidence)] * 4


def test_rounds_that_denoise_and_solve_in_fourier_space():
    class Splitting(nn.Module):
        """Zhang et al. 2017 (half-quadratic splitting): a denoiser, then a division by |k|^2 + mu in Fourier space."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            kernel = torch.zeros(8, 8, dtype=torch.float64)
            kernel[:2, :2] = 0.25
            self.register_buffer("kernel", torch.fft.fft2(kernel))
            self.denoisers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)) for _ in range(4)
            )

        def forward(self, y):
            x, data = y, self.kernel.conj() * torch.fft.fft2(y)
            for k, denoiser in enumerate(self.denoisers):
                mu = 0.1 * (k + 1)
                z = torch.fft.fft2(x - denoiser(x))
                x = torch.fft.ifft2((data + mu * z) / (self.kernel.abs() ** 2 + mu)).real
            return x

    found = identify(trace(Splitting().double(), torch.randn(2, 1, 8, 8).double()))
    told = {r.name.split(" (")[0] for r in found if r.name not in ("fork", "transition", "plain")}
    assert told <= {"semi-implicit", "not a step"}  # a state that is a spectrum is no state of the same space
