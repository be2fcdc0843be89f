"""Samplers of one evaluation, and first and last steps of others: one field, with a linear part that varies in time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import Identification

from . import samplers as s


def read(model: nn.Module) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    return stabkit.identify(stabkit.trace(model.double(), torch.randn(3, s.WIDTH, dtype=torch.float64)), checks=False)


class Eps(nn.Module):
    """x + c_out F(c_in x): a denoiser made of a network that predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = s.Net()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return 0.9 * x - sigma * self.inner(x / (sigma**2 + 1).sqrt(), sigma.log())


class Karras(nn.Module):
    """Steps of the samplers of k-diffusion down to no noise.

    Args:
        net: the denoiser.
        method: ``"euler"``, ``"heun"``, ``"dpm2"`` (the midpoint in log sigma) or ``"ancestral"``.
    """

    def __init__(self, net: Callable[[], nn.Module], method: str, rounds: int = 4) -> None:
        super().__init__()
        self.net, self.method = net(), method
        self.sigmas = torch.cat([s.sigmas(rounds), torch.zeros(1, dtype=torch.float64)])

    def derivative(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (x - self.net(x, sigma)) / sigma

    def down(self, i: int) -> Tensor:
        now, then = self.sigmas[i], self.sigmas[i + 1]
        return then**2 / now if self.method == "ancestral" else then

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.sigmas) - 1):
            now, then = self.sigmas[i], self.sigmas[i + 1]
            d, dt = self.derivative(x, now), self.down(i) - now
            if self.method == "ancestral":
                x = x + d * dt
                x = x + torch.randn_like(x) * (then**2 - self.down(i) ** 2).sqrt() if then > 0 else x
            elif self.method == "euler" or then == 0:
                x = x + d * dt
            elif self.method == "heun":
                x = x + (d + self.derivative(x + d * dt, then)) / 2 * dt
            else:
                mid = (now * then).sqrt()
                x = x + self.derivative(x + d * (mid - now), mid) * dt
        return x

    @property
    def sizes(self) -> list[float]:
        return [float(self.down(i) - self.sigmas[i]) for i in range(len(self.sigmas) - 1)]


NETS = [s.Net, s.Preconditioned, Eps]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["euler", "heun", "dpm2", "ancestral"])
def test_every_step_down_to_no_noise_has_the_step_of_the_noise_level(net, method):
    model = Karras(net, method)
    found = read(model)
    assert [r.step_size for r in found] == pytest.approx(model.sizes)
    assert {r.evidence for r in found} == {"proven"}
    first = {"heun": "heun2", "dpm2": "2-stage Runge-Kutta (c = "}.get(method, "forward Euler")
    assert [r.name.startswith(first) for r in found[:-1]] == [True] * 3
    assert found[-1].name == "forward Euler"


def test_the_numbers_of_what_bends_alone_are_told_too():
    (*_, last) = read(Karras(s.Preconditioned, "euler"))
    sigma, data = 0.01, 0.5
    a, b = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
    assert f"x' = {a:.4g} x + {b:.4g} g(x), with what bends in the field alone as g" in last.notes


def test_the_midpoint_in_log_sigma_has_its_second_stage_where_that_lies():
    model = Karras(s.Net, "dpm2")
    for i, record in enumerate(read(model)[:-1]):
        now, then = model.sigmas[i], model.sigmas[i + 1]
        c = float(((now * then).sqrt() - now) / (then - now))
        assert record.name == f"2-stage Runge-Kutta (c = {c:.3g}, b = 0 and 1, order 1)"


def dpm_solver_3(m: s.Loop, x: Tensor, i: int) -> Tensor:
    """Lu et al. 2022, the singlestep method of order 3, stages at a third and two thirds."""
    lam = torch.linspace(-1.5, 2, 3 * m.rounds + 1, dtype=x.dtype)
    alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    start, one, two, stop = range(3 * i, 3 * i + 4)
    h = lam[stop] - lam[start]
    e = m.net(x, lam[start])
    u = alpha[one] / alpha[start] * x - sigma[one] * torch.expm1(h / 3) * e
    d = m.net(u, lam[one]) - e
    z = 2 * h / 3
    u = alpha[two] / alpha[start] * x - sigma[two] * (torch.expm1(z) * e + 2 * (torch.expm1(z) / z - 1) * d)
    d = m.net(u, lam[two]) - e
    return alpha[stop] / alpha[start] * x - sigma[stop] * (torch.expm1(h) * e + 1.5 * (torch.expm1(h) / h - 1) * d)


def test_a_method_of_three_stages_beside_a_linear_part_has_its_numbers():
    found = read(s.Loop(dpm_solver_3))
    assert [r.name.startswith("exponential Runge-Kutta type (3 stages, carried on by 1, ") for r in found] == [True] * 4


def test_two_damped_steps_in_one_are_no_exponential_method():
    def twice(m: s.Loop, x: Tensor, i: int) -> Tensor:
        for _ in range(2):
            x = 0.9 * x + 0.2 * m.net(x, 0.0)
        return x

    found = stabkit.identify(
        stabkit.trace(nn.Sequential(*(s.Loop(twice, rounds=1) for _ in range(3))).double(),
                      torch.randn(3, s.WIDTH, dtype=torch.float64), depth=["0", "1", "2"]),
        checks=False,
    )  # fmt: skip
    assert not any("exponential" in r.name for r in found)


class Variance(nn.Module):
    """Euler steps of the probability flow of a variance-preserving process, or of its reverse equation with noise."""

    def __init__(self, *, noise: bool, rounds: int = 5) -> None:
        super().__init__()
        self.net, self.noise, self.rounds = s.Net(), noise, rounds

    def forward(self, x: Tensor) -> Tensor:
        dt = -1 / self.rounds
        for i in range(self.rounds):
            t = 1 + i * dt
            beta = 0.1 + 4 * t
            score = -self.net(x, t) / math.sqrt(1 - math.exp(-beta))
            drift = -0.5 * beta * x
            x = x + (drift - (1.0 if self.noise else 0.5) * beta * score) * dt
            if self.noise:
                x = x + math.sqrt(-beta * dt) * torch.randn_like(x)
        return x


@pytest.mark.parametrize("noise", [False, True])
def test_a_drift_and_a_score_are_one_field(noise):
    found = read(Variance(noise=noise))
    assert {r.name for r in found} == {"forward Euler" + " with noise (Euler-Maruyama)" * noise}
    assert [r.step_size for r in found] == pytest.approx([-0.2] * 5)


class Leaking(nn.Module):
    """Relaxation with one rate: a damping, whatever the step sizes are."""

    def __init__(self, rates: tuple[float, ...], sizes: tuple[float, ...]) -> None:
        super().__init__()
        self.net, self.rates, self.sizes = s.Net(), rates, sizes

    def forward(self, x: Tensor) -> Tensor:
        for rate, h in zip(self.rates, self.sizes, strict=True):
            x = x + h * (self.net(x, 0.0) - rate * x)
        return x


@pytest.mark.parametrize(
    ("rates", "sizes", "name"),
    [
        ((0.5, 0.5, 0.5), (0.1, 0.1, 0.1), "damped Euler (a = 0.95)"),
        ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3), "damped Euler (a = 0.9)"),
        ((0.5, 1.5, 2.5), (0.1, 0.1, 0.1), "forward Euler"),
    ],
)
def test_one_rate_is_a_damping_and_rates_that_vary_are_of_the_field(rates, sizes, name):
    assert read(Leaking(rates, sizes))[1].name == name


class Clipped(nn.Module):
    """Ancestral steps of DDPM by the clipped prediction of the data, the last one without a skip."""

    def __init__(self, rounds: int = 4) -> None:
        super().__init__()
        self.net, self.rounds = s.Net(), rounds

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.linspace(0.6, 0.0, self.rounds, dtype=x.dtype)
        for i in range(self.rounds):
            of_sample = kept[torch.full((len(x),), i)].reshape(-1, 1)
            data = (1.5 * x - 0.9 * self.net(x, float(i))).clamp(-1, 1)
            x = of_sample * x + (1 - of_sample) * data + (i < self.rounds - 1) * 0.1 * torch.randn_like(x)
        return x


def test_the_last_number_of_a_schedule_is_no_branch_that_was_dropped():
    *others, last = read(Clipped().train())
    assert not any("stochastic depth" in r.name for r in (*others, last))
    assert [r.skip for r in others] == pytest.approx([0.6, 0.4, 0.2])
    assert last.skip == 0


class UniPC(nn.Module):
    """Zhao et al. 2023, order 2, with the numbers that its B_2 gives: predicted, evaluated, corrected."""

    def __init__(self, *, noise: bool, rounds: int = 6) -> None:
        super().__init__()
        self.net, self.noise, self.rounds = s.Net(), noise, rounds

    def value(self, x: Tensor, i: int, alpha: Tensor, sigma: Tensor) -> Tensor:
        eps = self.net(x, float(i))
        return eps if self.noise else (x - sigma[i] * eps) / alpha[i]

    def forward(self, x: Tensor) -> Tensor:
        square = torch.linspace(0.1, 0.97, self.rounds + 1, dtype=x.dtype)
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        lam = (alpha / sigma).log()
        to, frm = (sigma, alpha) if self.noise else (alpha, sigma)
        kept = [self.value(x, 0, alpha, sigma)]
        for i in range(1, self.rounds + 1):
            h = lam[i] - lam[i - 1]
            phi = torch.expm1(h if self.noise else -h)
            plain = frm[i] / frm[i - 1] * x - to[i] * phi * kept[-1]
            if len(kept) == 1:
                kept.append(self.value(plain, i, alpha, sigma))
                x = plain - to[i] * phi * 0.5 * (kept[-1] - kept[-2])
                continue
            slope = (kept[-2] - kept[-1]) * h / (lam[i - 2] - lam[i - 1])
            new = self.value(plain - to[i] * phi * 0.5 * slope, i, alpha, sigma)
            x = plain - to[i] * phi * (0.2 * slope + 0.4 * (new - kept[-1]))
            kept.append(new)
        return x


@pytest.mark.parametrize("noise", [True, False])
def test_unipc_predicts_and_corrects_beside_a_linear_part(noise):
    first, *found = read(UniPC(noise=noise))
    assert len(found) == 5
    assert first.name == "fork"  # two evaluations, one at the prediction: no splitting
    assert {r.name.partition(",")[0] for r in found} == {"exponential predictor-corrector (1 stage"}
    assert all("weights 0.4, " in r.system for r in found)
