"""Recurrences behind convolutions by Fourier transforms: read where the kernel is a sum of powers, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stabkit

WIDTH, MODES, TIMES = 4, 3, 16


class Diagonal(nn.Module):
    """S4D as its authors publish it (Gu et al. 2022), or with what makes another kernel of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.log_dt = nn.Parameter(torch.rand(WIDTH) * 4 - 6)
        self.C = nn.Parameter(torch.randn(WIDTH, MODES, 2))
        self.log_real = nn.Parameter(torch.log(0.5 * torch.ones(WIDTH, MODES)))
        self.imaginary = nn.Parameter(math.pi * torch.arange(MODES).repeat(WIDTH, 1))
        self.window = nn.Parameter(torch.randn(TIMES))

    def z(self) -> Tensor:
        return (-torch.exp(self.log_real) + 1j * self.imaginary) * torch.exp(self.log_dt)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        u, count = x.transpose(1, 2), x.shape[1]
        powers = torch.exp(self.z()[..., None] * torch.arange(count))
        if self.kind == "squared":
            powers = torch.exp(self.z()[..., None] * torch.arange(count) ** 2)
        k = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(self.C), powers).real
        if self.kind == "windowed":  # Hyena: a filter of its own times a decay
            k = k * self.window
        long = count if self.kind == "wraps" else 2 * count
        y = torch.fft.irfft(torch.fft.rfft(u, n=long) * torch.fft.rfft(k, n=long), n=long)[..., :count]
        return torch.nn.functional.gelu(y.transpose(1, 2))


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.mixers = nn.Linear(3, WIDTH), nn.ModuleList([Diagonal(kind) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x.mean(1)


def read(kind: str) -> tuple[Network, list[stabkit.identification.record.Recurrence]]:
    torch.manual_seed(0)
    model = Network(kind)
    records = stabkit.identify(stabkit.trace(model, torch.randn(2, TIMES, 3)), checks=False)
    return model, [found for record in records for found in record.over_time]


def test_the_powers_of_a_kernel_are_the_numbers_of_its_recurrence():
    model, found = read("")
    assert [r.n_steps for r in found] == [TIMES] * 2
    for mixer, record in zip(model.mixers, found, strict=True):
        a = torch.exp(mixer.z().detach().to(torch.complex128)).abs()
        assert record.name.startswith("exponential step (exact in the state")
        assert record.evidence == "measured"
        assert record.low == pytest.approx(float(a.min()), rel=1e-5)
        assert record.high == pytest.approx(float(a.max()), rel=1e-5)


@pytest.mark.parametrize("kind", ["squared", "windowed", "wraps"])
def test_other_kernels_are_those_of_no_recurrence(kind):
    assert read(kind)[1] == []
