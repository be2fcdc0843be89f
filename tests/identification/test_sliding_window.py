"""Windows of the last states that move with every step: maps of order k, in the spellings that code has for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

LAST, WIDTH, ROUNDS = 4, 3, 5


def joined(w, new):
    return torch.cat([w[:, 1:], new[:, None]], 1)


def rolled(w, new):
    w = torch.roll(w, -1, 1).clone()
    w[:, -1] = new
    return w


def newest_first(w, new):
    return torch.cat([new[:, None], w[:, :-1]], 1)


class Forecast(nn.Module):
    """Forecasts step by step, each of all that the window holds."""

    def __init__(self, move, *, adds=False):
        super().__init__()
        self.field = nn.Sequential(nn.Flatten(), nn.Linear(LAST * WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.move, self.adds = move, adds

    def forward(self, w):
        for _ in range(ROUNDS):
            new = self.field(w)
            w = self.move(w, w[:, -1] + new if self.adds else new)
        return w


class Queue(nn.Module):
    """The same with a list in the place of the tensor."""

    def __init__(self):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(LAST * WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, w):
        held = [w[:, i] for i in range(LAST)]
        for _ in range(ROUNDS + 1):
            held = [*held[1:], self.field(torch.cat(held, -1))]
        return torch.stack(held, 1)


class Images(nn.Module):
    """Channels are times (Li et al. 2021), a block of two of them is new."""

    def __init__(self):
        super().__init__()
        self.field = nn.Sequential(nn.Conv2d(LAST, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, x):
        for _ in range(ROUNDS):
            x = torch.cat((x[:, 2:], self.field(x)), 1)
        return x


def names(model, *shape):
    torch.manual_seed(0)
    return [(r.name, r.evidence) for r in identify(trace(model, torch.randn(2, *shape)))]


MOVES = [
    (lambda: Forecast(joined), (LAST, WIDTH), "autoregressive map of order 4 (sliding window)"),
    (lambda: Forecast(rolled), (LAST, WIDTH), "autoregressive map of order 4 (sliding window)"),
    (lambda: Forecast(newest_first), (LAST, WIDTH), "autoregressive map of order 4 (sliding window)"),
    (
        lambda: Forecast(joined, adds=True),
        (LAST, WIDTH),
        "forward Euler in the newest state (sliding window of 4 states)",
    ),
    (Images, (LAST, 5, 5), "autoregressive map of order 2 (sliding window)"),
]


@pytest.mark.parametrize(("make", "shape", "name"), MOVES)
def test_a_window_that_moves_is_a_map_of_as_many_states(make, shape, name):
    assert names(make(), *shape) == [(name, "measured")] * ROUNDS


def test_a_list_of_the_last_states_is_a_window():
    inner = [found for found in names(Queue(), LAST, WIDTH) if found[0] not in ("fork", "join", "transition")]
    assert len(inner) >= ROUNDS
    assert set(inner[:-1]) == {(f"autoregressive map of order {LAST} (sliding window)", "measured")}


class Pair(nn.Module):
    """A forecast of what changes, made of the last two states (GraphCast)."""

    def __init__(self):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2 * WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH))

    def forward(self, w):
        outputs = []
        for _ in range(ROUNDS + 1):
            before, now = w[:, 0], w[:, 1]
            outputs.append(now + 0.5 * self.field(torch.cat([before, now], -1)))
            w = torch.stack([now, outputs[-1]], 1)
        return torch.stack(outputs, 1)


def test_two_states_that_move_up_are_a_window_of_which_the_newest_makes_an_euler_step():
    torch.manual_seed(0)
    found = identify(trace(Pair(), torch.randn(3, 2, WIDTH)), checks=False)[:-1]
    name = "forward Euler in the newest state (sliding window of 2 states)"
    assert [(record.name, record.step_size) for record in found] == [(name, 0.5)] * ROUNDS


class Adams(nn.Module):
    """A multistep method that keeps its last states, and evaluates its field at each of them anew."""

    def __init__(self, weights):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.weights = weights

    def forward(self, w):
        for _ in range(ROUNDS):
            new = w[:, -1] + 0.1 * sum(b * self.field(w[:, -1 - i]) for i, b in enumerate(self.weights))
            w = joined(w, new)
        return w


@pytest.mark.parametrize(
    ("weights", "name", "h"),
    [
        ((1.5, -0.5), "ab2 (sliding window of 4 states)", 0.1),
        ((23 / 12, -16 / 12, 5 / 12), "ab3 (sliding window of 4 states)", 0.1),
        ((0.7, 0.3), "forward Euler in the newest state (sliding window of 4 states)", None),
    ],
)
def test_values_of_one_field_at_the_last_states_are_a_multistep_method(weights, name, h):
    torch.manual_seed(0)
    found = identify(trace(Adams(weights), torch.randn(2, LAST, WIDTH)), checks=False)
    assert {record.name for record in found} == {name}
    assert all(record.step_size == (None if h is None else pytest.approx(h)) for record in found)
    assert all(f"made of {len(weights)} of the 4" in record.notes[0] for record in found)


class Swapped(nn.Module):
    """A look-alike: channels that pass a block by, and change places with those that do not (ShuffleNet)."""

    def __init__(self):
        super().__init__()
        self.field = nn.Linear(4, 4)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, torch.tanh(self.field(b))], 1)
        return x.reshape(len(x), 2, 4).transpose(1, 2).reshape(len(x), 8)


class Turned(nn.Module):
    """A look-alike: nothing is made, the entries go around."""

    def forward(self, x):
        return torch.cat([x[:, 1:], x[:, :1]], 1)


@pytest.mark.parametrize("block", [Swapped, Turned])
def test_entries_that_change_places_are_no_window(block):
    found = names(nn.Sequential(nn.Linear(8, 8), *(block() for _ in range(3)), nn.Linear(8, 8)), 8)
    assert not any("window" in name for name, _ in found)


class Simulator(nn.Module):
    """Particles whose acceleration is learned from their last velocities (GNS), rolled out."""

    def __init__(self, how):
        super().__init__()
        self.field = nn.Sequential(nn.Flatten(), nn.Linear((LAST - 1) * WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.how = how

    def forward(self, w):
        for _ in range(ROUNDS):
            velocity = w[:, 1:] - w[:, :-1]
            force = self.field(velocity)
            if self.how == "velocity":
                new = w[:, -1] + (velocity[:, -1] + force)
            elif self.how == "positions":
                new = 2 * w[:, -1] - w[:, -2] + 0.25 * force
            else:
                new = w[:, -1] + 0.9 * velocity[:, -1] + force
            w = joined(w, new)
        return w


@pytest.mark.parametrize("how", ["velocity", "positions", "friction"])
def test_a_window_whose_newest_state_follows_its_last_velocity_is_verlet(how):
    torch.manual_seed(0)
    flow = trace(Simulator(how).double(), torch.randn(2, LAST, WIDTH).double())
    found = {(r.name, r.evidence) for r in identify(flow, checks=False)}
    verlet = f"second_order_leapfrog (Stormer-Verlet, position form), force of {LAST} positions (sliding window)"
    other = f"autoregressive map of order {LAST} (sliding window)"
    assert found == {(other if how == "friction" else verlet, "measured")}


class Listed(nn.Module):
    """The same with a list of three positions."""

    def __init__(self):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2 * WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, w):
        h = list(w.unbind(1))
        for _ in range(ROUNDS):
            velocities = [b - a for a, b in itertools.pairwise(h)]
            force = self.field(torch.cat(velocities, -1))
            h = [*h[1:], 2 * h[-1] - h[-2] + force]
        return h[-1]


def test_what_is_held_beside_a_state_is_no_dense_layer():
    torch.manual_seed(0)
    flow = trace(Listed().double(), torch.randn(2, 3, WIDTH).double())
    assert flow.steps[-2].operations == ("Sub", "Cat")  # a cut lies between the parts of the last round
    assert not any(r.name.startswith("dense") for r in identify(flow, checks=False))
