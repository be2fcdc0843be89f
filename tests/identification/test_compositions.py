from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.identification.names.compositions import order_of
from stabkit.tracing import trace

WIDTH = 6
ONE = 1 / (2 - 2 ** (1 / 3))
YOSHIDA = (ONE, 1 - 2 * ONE, ONE)
FIVE = 1 / (4 - 4 ** (1 / 3))
SUZUKI = (FIVE, FIVE, 1 - 4 * FIVE, FIVE, FIVE)


class Solver(nn.Module):
    """Steps of an integrator for q'' = f(q) in one loop."""

    def __init__(self, step, n=3, h=0.1):
        super().__init__()
        self.force = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.step, self.n, self.h = step, n, h

    def forward(self, x):
        q, p = x.chunk(2, -1)
        for _ in range(self.n):
            q, p = self.step(self.force, q, p, self.h)
        return torch.cat([q, p], -1)


def kick_drift_kick(f, q, p, h):
    p = p + h / 2 * f(q)
    q = q + h * p
    return q, p + h / 2 * f(q)


def drift_kick_drift(f, q, p, h):
    q = q + h / 2 * p
    p = p + h * f(q)
    return q + h / 2 * p, p


def composed(part, weights):
    def step(f, q, p, h):
        for weight in weights:
            q, p = part(f, q, p, weight * h)
        return q, p

    return step


def ruth(f, q, p, h):
    for a, b in ((2 / 3, 7 / 24), (-2 / 3, 3 / 4), (1.0, -1 / 24)):
        p = p + b * h * f(q)
        q = q + a * h * p
    return q, p


def forest_ruth(f, q, p, h):
    for a, b in zip((ONE / 2, (1 - ONE) / 2, (1 - ONE) / 2), YOSHIDA, strict=True):
        q = q + a * h * p
        p = p + b * h * f(q)
    return q + ONE / 2 * h * p, p


def mclachlan(f, q, p, h):
    v = 0.1931833275037836
    for b, a in ((v, 0.5), (1 - 2 * v, 0.5)):
        p = p + b * h * f(q)
        q = q + a * h * p
    return q, p + v * h * f(q)


def baoab(f, q, p, h, a=0.95):
    p = p + h / 2 * f(q)
    q = q + h / 2 * p
    p = a * p
    q = q + h / 2 * p
    return q, p + h / 2 * f(q)


def with_friction(f, q, p, h, g=0.3):
    half = p + h / 2 * (f(q) - g * p)
    q = q + h * half
    return q, (half + h / 2 * f(q)) / (1 + h * g / 2)


def records(step, h=0.1):
    torch.manual_seed(0)
    return identify(trace(Solver(step, h=h), torch.randn(3, 2 * WIDTH)))


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (composed(kick_drift_kick, YOSHIDA), "Yoshida 4"),
        (composed(drift_kick_drift, YOSHIDA), "Yoshida 4"),
        (forest_ruth, "Yoshida 4"),
        (composed(kick_drift_kick, SUZUKI), "Suzuki 4"),
        (ruth, "Ruth 3"),
        (mclachlan, "McLachlan 2"),
    ],
)
@pytest.mark.parametrize("h", [0.1, -0.25])
def test_a_composition_is_named_by_its_coefficients(step, name, h):
    fork, *found = records(step, h)
    assert fork.name == "fork"
    assert len(found) == 3  # one for each time step of the solver, and nothing beside them
    assert all(record.name.startswith(name) for record in found)
    assert {record.evidence for record in found} == {"proven"}
    assert [record.step_size for record in found] == pytest.approx([h] * 3, rel=1e-5)
    assert [index for record in found for index in record.steps] == list(range(1, found[-1].steps[-1] + 1))


@pytest.mark.parametrize(
    ("step", "sizes"), [(kick_drift_kick, [0.1] * 3), (composed(kick_drift_kick, (0.4, 0.6)), [0.04, 0.06] * 3)]
)
def test_steps_that_make_no_composition_of_higher_order_stay_single(step, sizes):
    first, *steps = records(step)
    assert first.name == "fork"
    assert {(record.name, record.evidence) for record in steps} == {("stormer_verlet", "proven")}
    assert [record.step_size for record in steps] == pytest.approx(sizes)


@pytest.mark.parametrize(
    ("step", "sizes"),
    [(drift_kick_drift, [0.1] * 3), (composed(drift_kick_drift, (0.4, 0.6)), [0.04, 0.06] * 3)],
)
def test_a_kick_between_two_halves_of_a_drift_is_verlet_too(step, sizes):
    first, *steps = records(step)
    assert first.name == "fork"
    assert {(record.name, record.evidence) for record in steps} == {("stormer_verlet", "proven")}
    assert [record.step_size for record in steps] == pytest.approx(sizes)


def uneven(kicks_first, share):
    def step(f, q, p, h):
        for weight in (share, 1 - share):
            if kicks_first:
                p = p + weight * h * f(q)
                q = q + h * p if weight == share else q
            else:
                q = q + weight * h * p
                p = p + h * f(q) if weight == share else p
        return q, p

    return step


@pytest.mark.parametrize("kicks_first", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_three_kicks_and_drifts_without_halves_are_of_order_one(kicks_first, share):
    # the same trace and determinant as Verlet's method and symplectic Euler, to which they are conjugate
    _, *steps = [record for record in records(uneven(kicks_first, share)) if record.name != "part of a step"]
    assert {record.name for record in steps} == {"symplectic composition (order 1, 3 kicks and drifts)"}
    assert {round(record.step_size, 6) for record in steps} == {0.1}


def test_a_leapfrog_backward_in_time_has_a_negative_step():
    sizes = {round(r.step_size, 6) for r in records(composed(kick_drift_kick, (-0.5, 1.0))) if r.step_size}
    assert sizes == {-0.05, 0.1}


@pytest.mark.parametrize("step", [baoab, with_friction])
def test_verlet_with_friction(step):
    found = {record.name[:22] for record in records(step)} - {"fork", "join"}
    assert found == {"damped stormer_verlet "}


def test_a_separable_hamiltonian_of_two_learned_parts():
    class Separable(nn.Module):
        def __init__(self):
            super().__init__()
            self.T, self.V = (nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 1)) for _ in range(2))

        def forward(self, x):
            q, p = x.chunk(2, -1)
            for _ in range(2):
                for a, b in zip((ONE / 2, (1 - ONE) / 2, (1 - ONE) / 2, ONE / 2), (*YOSHIDA, 0.0), strict=True):
                    q = q + a * 0.1 * torch.autograd.grad(self.T(p).sum(), p, create_graph=True)[0]
                    if b:
                        p = p - b * 0.1 * torch.autograd.grad(self.V(q).sum(), q, create_graph=True)[0]
            return torch.cat([q, p], -1)

    torch.manual_seed(0)
    found = identify(trace(Separable(), torch.randn(3, 2 * WIDTH, requires_grad=True)))
    assert any(record.name.startswith("Yoshida 4") for record in found)
    assert not any("leapfrog and then" in record.name for record in found)


def test_a_linear_map_of_two_states_is_no_oscillator():
    def heavy_ball(f, a, b, h):
        return b, b + 0.9 * (b - a) + h * f(b)

    assert not any("oscillator" in record.name for record in records(heavy_ball))


@pytest.mark.parametrize("data", [False, True])
def test_the_exponential_midpoint_of_diffusion_samplers(data):
    class Sampler(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH))

        def forward(self, x):
            ends = torch.linspace(-2, 2, 4).tolist()  # half the log of the ratio of signal to noise
            for low, high in itertools.pairwise(ends):
                (_, s0, a0), (mid, sm, am), (_, s1, a1) = map(_scales, (low, (low + high) / 2, high))
                if data:
                    u = sm / s0 * x - am * math.expm1(low - mid) * self.net(x)
                    x = s1 / s0 * x - a1 * math.expm1(low - high) * self.net(u)
                else:
                    u = am / a0 * x - sm * math.expm1(mid - low) * self.net(x)
                    x = a1 / a0 * x - s1 * math.expm1(high - low) * self.net(u)
            return x

    def _scales(half_log_snr):
        signal = 1 / (1 + math.exp(-2 * half_log_snr))
        return half_log_snr, math.sqrt(1 - signal), math.sqrt(signal)

    torch.manual_seed(0)
    names = [record.name for record in identify(trace(Sampler(), torch.randn(3, WIDTH)))]
    assert len(names) == 3
    assert all(name.startswith("exponential midpoint") for name in names)


def test_the_order_of_a_splitting():
    assert order_of((1.0, 1.0)) == 1
    assert order_of((0.5, 1.0, 0.5)) == 2
    assert order_of((0.3, 0.5, 0.7, 0.5)) == 1


class _OfTwoFields(nn.Module):
    """Drifts and kicks with two learned fields and given numbers."""

    def __init__(self, drifts, kicks):
        super().__init__()
        self.T, self.V = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2))
        self.numbers = tuple(zip(drifts, kicks, strict=True))

    def forward(self, q, p):
        for drift, kick in self.numbers:
            q = q + self.T(p) * drift * 0.1
            p = p - self.V(q) * kick * 0.1
        return q, p


class _Rolled(nn.Module):
    """Three such steps; the trajectory is kept, or the last state alone."""

    def __init__(self, drifts, kicks, *, kept):
        super().__init__()
        self.step, self.kept = _OfTwoFields(drifts, kicks), kept

    def forward(self, x):
        q, p = x.chunk(2, -1)
        states = []
        for _ in range(3):
            q, p = self.step(q, p)
            states.append(torch.cat([q, p], -1))
        return torch.stack(states) if self.kept else states[-1]


def _of_two_fields(drifts, kicks, *, kept=False):
    torch.manual_seed(0)
    return identify(trace(_Rolled(drifts, kicks, kept=kept), torch.randn(3, 8)))


@pytest.mark.parametrize("kept", [False, True])
def test_a_last_kick_that_is_multiplied_by_zero_is_none(kept):
    """Forest and Ruth's tableau as it is printed: four drifts, and four kicks of which the last one is none."""
    drifts = (ONE / 2, (1 - ONE) / 2, (1 - ONE) / 2, ONE / 2)
    found = [r for r in _of_two_fields(drifts, (*YOSHIDA, 0.0), kept=kept) if r.method is not None]
    assert len(found) >= 2
    assert {r.name for r in found} == {"Yoshida 4 (Forest-Ruth, three leapfrogs)"}
    assert all(r.step_size == pytest.approx(0.1) and r.evidence == "proven" for r in found)
    found = _of_two_fields((0.5, 0.5), (1.0, 0.0), kept=kept)
    assert [r.name for r in found if r.method is not None][:2] == ["stormer_verlet"] * 2


def test_numbers_of_two_branches_are_both_told():
    found = _of_two_fields((0.2, 0.5, 0.3), (0.3, 0.3, 0.4))
    told = [r.convention for r in found if r.name.startswith("reversible")]
    assert told[0] == "h: the largest of the numbers that multiply the branches, 0.02, 0.03"
    assert not any("x_0 too" in r.name for r in found)
