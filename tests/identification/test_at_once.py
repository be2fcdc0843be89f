"""Linear recurrences that are computed for all times at once: what they are, and what is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.identification import identify
from stabkit.identification.record import Recurrence

WIDTH, TIMES = 6, 13


def hillis_steele(a: Tensor, b: Tensor) -> Tensor:
    k = 1
    while k < b.shape[1]:
        b = torch.cat([b[:, :k], b[:, k:] + a[:, k:] * b[:, :-k]], 1)
        a = torch.cat([a[:, :k], a[:, k:] * a[:, :-k]], 1)
        k *= 2
    return b


def padded_doubling(a: Tensor, b: Tensor) -> Tensor:
    k = 1
    while k < b.shape[1]:
        b = b + a * functional.pad(b, (0, 0, k, 0))[:, : b.shape[1]]
        a = a * functional.pad(a, (0, 0, k, 0), value=1.0)[:, : b.shape[1]]
        k *= 2
    return b


def blelloch(a: Tensor, b: Tensor) -> Tensor:
    def scan(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        n = a.shape[1]
        if n < 2:
            return a, b
        odd = scan(a[:, 1::2] * a[:, : n - 1 : 2], a[:, 1::2] * b[:, : n - 1 : 2] + b[:, 1::2])
        last = n // 2 - (n % 2 == 0)
        even = a[:, 2::2] * odd[0][:, :last], a[:, 2::2] * odd[1][:, :last] + b[:, 2::2]
        found = []
        for first, e, o in zip((a, b), even, odd, strict=True):
            out = torch.empty_like(first)
            out[:, ::2], out[:, 1::2] = torch.cat([first[:, :1], e], 1), o
            found.append(out)
        return found[0], found[1]

    return scan(a, b)[1]


def running_products(a: Tensor, b: Tensor) -> Tensor:
    products = a.cumprod(1)
    return products * (b / products).cumsum(1)


class Loop(torch.autograd.Function):
    """A hand-written backward, as that of a parallel scan."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h, found = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = a[:, t] * h + b[:, t]
            found.append(h)
        states = torch.stack(found, 1)
        ctx.save_for_backward(a, states)
        return states

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        a, states = ctx.saved_tensors
        g, found = torch.zeros_like(given[:, 0]), []
        for t in reversed(range(a.shape[1])):
            g = given[:, t] + (a[:, t + 1] * g if t + 1 < a.shape[1] else 0)
            found.append(g)
        pulled = torch.stack(found[::-1], 1)
        return pulled * functional.pad(states, (0, 0, 1, -1)), pulled


class Gated(nn.Module):
    """h' = a h + (1 - a) v, with a of the input."""

    def __init__(self, scan: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scan, self.gate, self.value = scan, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.gate(x))
        self.a = a.detach()
        return torch.tanh(self.scan(a, (1 - a) * torch.tanh(self.value(x))))


class MinGRU(Gated):
    """The same in logarithms (Feng et al. 2024)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = self.gate(x), self.value(x)
        self.a = torch.sigmoid(-gate).detach()
        log_g = torch.where(hidden >= 0, (functional.relu(hidden) + 0.5).log(), -functional.softplus(-hidden))
        values, decays = -functional.softplus(-gate) + log_g, -functional.softplus(gate).cumsum(1)
        return (decays + (values - decays).logcumsumexp(1)).exp()


class Oscillator(nn.Module):
    """LinOSS (Rusch and Rus 2025), implicit, by doubling of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.dt = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, u: Tensor) -> Tensor:
        A, dt = functional.relu(self.A), torch.sigmoid(self.dt)
        S = 1 / (1 + dt**2 * A)
        rows = [torch.stack(row, -1) for row in ((S, -A * dt * S), (dt * S, S))]
        M, h, k = torch.stack(rows, -2), torch.stack([dt * S * u, dt**2 * S * u], -1), 1
        while k < u.shape[1]:
            earlier = functional.pad(h, (0, 0, 0, 0, k, 0))[:, : u.shape[1]]
            h, M, k = h + torch.einsum("pij,btpj->btpi", M, earlier), M @ M, 2 * k
        return torch.tanh(h[..., 1])


class Network(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms, self.mixers = (nn.ModuleList(f() for _ in "ab") for f in (lambda: nn.LayerNorm(WIDTH), make))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


def read(make: Callable[[], nn.Module]) -> tuple[Any, list[tuple[Recurrence, ...]]]:
    torch.manual_seed(0)
    model = Network(make).double()
    x = torch.randn(2, TIMES, WIDTH, dtype=torch.float64)
    records = identify(stabkit.trace(model, x), checks=False)
    assert all(r.name.startswith("forward Euler") for r in records)
    assert len(records) == 2
    model(x)  # keeps the factors, with which readings are compared
    return model, [r.over_time for r in records]


@pytest.mark.parametrize("scan", [hillis_steele, padded_doubling, blelloch, running_products, Loop.apply])
def test_a_gated_recurrence_is_read_however_it_is_computed(scan):
    model, found = read(lambda: Gated(scan))
    for mixer, (time,) in zip(model.mixers, found, strict=True):
        assert re.match(r"gated Euler \(mean a = ", time.name)
        assert (time.n_steps, time.evidence, time.fed) == (TIMES, "measured", True)
        a = mixer.a[:, TIMES // 2]
        assert (time.low, time.high) == pytest.approx((float(a.min()), float(a.max())))
        assert any("for all times at once" in note for note in time.notes)


def test_a_recurrence_in_logarithms_is_read():
    model, found = read(lambda: MinGRU(hillis_steele))
    for mixer, (time,) in zip(model.mixers, found, strict=True):
        a = mixer.a[:, TIMES // 2]
        assert time.name == f"gated Euler (mean a = {float(a.mean()):.3g})"
        assert (time.low, time.high, time.fed) == (pytest.approx(float(a.min())), pytest.approx(float(a.max())), True)


def test_an_oscillator_is_read_from_doubled_matrices():
    _, found = read(Oscillator)
    assert [[time.name for time in times] for times in found] == [["backward Euler (linear oscillator)"]] * 2


class Own(nn.Module):
    def __init__(self, rule: Callable[[Own, Tensor], Tensor], parts: int = 1) -> None:
        super().__init__()
        self.rule, self.linear = rule, nn.Linear(WIDTH, parts * WIDTH)
        self.a = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def _linear_attention(m: Own, x: Tensor) -> Tensor:
    q, k, v = m.linear(x).sigmoid().chunk(3, -1)
    return torch.einsum("btk,btkv->btv", q, torch.einsum("btk,btv->btkv", k, v).cumsum(1))


def test_sums_over_time_are_told_by_their_factor_one():
    _, found = read(lambda: Own(_linear_attention, 3))
    assert [[(time.name, time.fed) for time in times] for times in found] == [[("sum over time (a = 1)", False)]] * 2


def _both_ways(m: Own, x: Tensor) -> Tensor:
    a, b, c, d = m.linear(x).chunk(4, -1)
    return torch.tanh(
        hillis_steele(a.sigmoid(), b.tanh()) + hillis_steele(c.sigmoid().flip(1), d.tanh().flip(1)).flip(1)
    )


def test_a_scan_and_one_that_runs_backward_are_two():
    _, found = read(lambda: Own(_both_ways, 4))
    assert [[time.name[:17] for time in times] for times in found] == [["linear recurrence"] * 2] * 2


def _attention(m: Own, x: Tensor) -> Tensor:
    q, k, v = m.linear(torch.cat([x[..., 1:], x[..., :1]], -1)).chunk(3, -1)
    return torch.softmax((q @ k.mT).masked_fill(torch.ones(TIMES, TIMES).triu(1).bool(), -torch.inf), -1) @ v


def _masked_decay(m: Own, x: Tensor) -> Tensor:
    q, k, v = m.linear(torch.cat([x[..., 1:], x[..., :1]], -1)).chunk(3, -1)
    t = torch.arange(TIMES)
    return torch.tanh((q @ k.mT * (0.9 ** (t[:, None] - t).to(x).clamp(min=0)).tril()) @ v)


def _token_shifts(m: Own, x: Tensor) -> Tensor:
    for k in (1, 2, 4):
        x = m.a * x + torch.tanh(functional.pad(x, (0, 0, k, 0))[:, :TIMES])
    return torch.tanh(m.linear(x))


def _products_alone(m: Own, x: Tensor) -> Tensor:
    z = torch.sigmoid(m.linear(x))
    return z * torch.cumprod(1 - z, 1)


def _sums_of_exponents(m: Own, x: Tensor) -> Tensor:
    return torch.tanh(torch.exp(functional.logsigmoid(m.linear(x)).cumsum(1)) * x)


class _Bins(nn.Module):
    """A monotone spline of every coordinate, whose knots are sums of widths (Durkan et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.widths(x).tanh().unflatten(-1, (WIDTH, 4)).softmax(-1)
        sums = 0.01 + 0.96 * shares
        knots = sums.cumsum(-1)
        bins = torch.full_like(x, 2, dtype=torch.long)[..., None]  # of coordinates in the middle all lie in one
        return x + torch.tanh(knots.gather(-1, bins)[..., 0] * x)


def test_sums_over_bins_are_no_recurrence_over_time():
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(_Bins(), _Bins()), torch.randn(1, WIDTH))
    assert all(record.over_time == () for record in identify(flow, checks=False))


_NONE = [(_attention, 3), (_masked_decay, 3), (_token_shifts, 1), (_products_alone, 1), (_sums_of_exponents, 1)]


@pytest.mark.parametrize(("rule", "parts"), _NONE, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_recurrence_of_one_state_is_not_read_as_one(rule, parts):
    _, found = read(lambda: Own(rule, parts))
    assert found == [(), ()]


def _scaled_up_before(m: Own, x: Tensor) -> Tensor:
    t, rate = torch.arange(TIMES, dtype=x.dtype)[:, None], functional.softplus(m.a)
    return torch.exp(-rate * t) * torch.cumsum(torch.exp(rate * t) * torch.tanh(x), 1)


def test_a_decay_that_scales_up_before_a_sum_and_down_behind_it_is_that_of_the_recurrence():
    model, found = read(lambda: Own(_scaled_up_before))
    for mixer, (time,) in zip(model.mixers, found, strict=True):
        decays = torch.exp(-functional.softplus(mixer.a)).tolist()
        assert time.name.startswith("linear recurrence (|a| ")
        assert (time.low, time.high) == pytest.approx((min(decays), max(decays)))
