"""Every state of a coupled system has a reading of its own, and says which values of the others it reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit import identify, trace


class Block(nn.Module):
    """A block of two states; ``mix`` makes a field of the second state's width from the first, and back."""

    def __init__(self, rule, widths=(6, 6)):
        super().__init__()
        a, b = widths
        self.rule = rule
        self.f, self.g = mlp(a), mlp(b)
        self.to_first, self.to_second = nn.Linear(b, a), nn.Linear(a, b)
        self.norm, self.other = nn.LayerNorm(a), nn.RMSNorm(b)

    def forward(self, x, y):
        return self.rule(self, x, y)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Pair(nn.Module):
    def __init__(self, rule, widths=(6, 6)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, widths[0]), nn.Linear(4, widths[1])
        self.blocks = nn.ModuleList([Block(rule, widths) for _ in range(5)])
        self.last = nn.Linear(sum(widths), 2)

    def forward(self, x):
        x, y = self.first(x), self.second(x)
        for block in self.blocks:
            x, y = block(x, y)
        return self.last(torch.cat([x, y], -1))


def middle(rule, widths=(6, 6), **more):
    """The third record of a stack, the same for all blocks in the middle."""
    found = identify(trace(Pair(rule, widths).double(), torch.randn(3, 4).double(), **more))
    inner = [r for r in found if r.name not in ("fork", "join", "transition", "no branch")]
    assert len({r.name for r in inner}) == 1
    return inner[1]


def heavy_ball(m, x, v):
    v = m.other(0.8 * v + m.f(m.norm(x)))
    return x + v, v


def nesterov(m, x, v):
    v = m.other(0.7 * v + 1.3 * m.f(m.norm(x + 0.6 * v)))
    return x + v, v


def nesterov_twice(m, x, v):
    for f in (m.f, m.g):
        v = m.other(0.7 * v + f(m.norm(x + 0.6 * v)))
        x = x + v
    return x, v


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (heavy_ball, "momentum (beta = 0.8), velocity normalised"),
        (nesterov, "Nesterov momentum (beta = 0.7, look-ahead 0.6), velocity normalised"),
        (nesterov_twice, "Nesterov momentum (beta = 0.7, look-ahead 0.6), velocity normalised"),
    ],
)
def test_a_normalised_velocity_is_still_momentum(rule, name):
    found = middle(rule)
    assert (found.name, found.evidence) == (name, "proven")


def test_a_position_that_has_a_field_of_its_own_is_no_momentum():
    def rule(m, x, v):
        v = m.other(0.8 * v + m.f(m.norm(x)))
        return x + v + m.g(x), v

    assert "momentum" not in middle(rule).name


def dual(m, x, total):
    a = m.f(x)
    x = m.norm(x + a)
    b = m.g(x)
    return m.norm(x + b), total + 0.5 * a + 0.5 * b


def collected(m, x, total):
    x = m.norm(x + m.f(x))
    return x, total + m.to_second(x)


@pytest.mark.parametrize("rule", [dual, collected])
def test_a_running_sum_beside_a_projected_state(rule):
    found = middle(rule)
    assert (found.name, found.evidence) == ("2 states: projected Euler (post-norm), running sum", "proven")
    assert "running sum" in found.system
    assert "read by no other" in found.system


@pytest.mark.parametrize("new", [True, False])
def test_accumulated_scores_that_feed_back(new):
    def rule(m, x, scores):
        after = scores + m.to_second(torch.tanh(x))
        weights = torch.softmax(after if new else scores, -1)
        return m.norm(x + m.f(x) * m.to_first(weights)), after

    found = middle(rule, widths=(6, 9))
    assert (found.name, found.evidence) == ("2 coupled states: projected Euler (post-norm), running sum", "proven")
    x = next(part for part in found.system.split("; ") if "projected" in part)
    assert ("reads new" in x, "reads old" in x) == (new, not new)


@pytest.mark.parametrize("new", [True, False], ids=["Gauss-Seidel", "forward"])
def test_two_streams_step_at_once_or_one_after_the_other(new):
    def rule(m, x, y):
        x_new = x + m.f(x) * torch.sigmoid(m.to_first(y))
        return x_new, y + m.g(y) + torch.tanh(m.to_second(x_new if new else x))

    found = middle(rule, widths=(6, 10))
    assert (found.name, found.evidence) == (
        f"{'Gauss-Seidel' if new else 'forward'} Euler of 2 coupled states",
        "proven",
    )


def test_states_of_one_shape_are_paired_by_what_they_carry():
    def rule(m, x, y):
        y_new = y + torch.tanh(m.to_second(x)) * m.g(y)
        return x + m.f(x) * torch.sigmoid(m.to_first(y)), y_new

    assert middle(rule).name == "forward Euler of 2 coupled states"


def test_a_mask_of_the_new_state_leaves_the_step_of_the_others():
    mask = torch.ones(3, 6, dtype=torch.float64)
    mask[1, :2] = 0

    def rule(m, x, forecast):
        both = torch.cat([m.f(x), m.to_second(torch.tanh(x))], -1)
        return (x - both[:, :6]) * mask, forecast + both[:, 6:]

    found = middle(rule)
    assert (found.name, found.evidence) == ("forward Euler, beside a sum of outputs", "measured")


def test_entries_that_are_replaced_are_not_masked():
    """A skip on some entries only, and something new at the others, is no step with a = 1."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = mlp(6)

        def forward(self, x):
            mask = torch.tensor([1.0, 1, 1, 0, 0, 0])
            return mask * x + torch.tanh(self.f(x))

    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(Half(), Half(), Half()), torch.randn(3, 6)))[1]
    assert (found.name, found.method, found.skip) == ("skip at some entries only (a = 1 at 50% of them)", None, None)


def test_a_masked_state_alone_is_a_step():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = mlp(6)

        def forward(self, x):
            return (x + self.f(x)) * torch.tensor([1.0, 1, 1, 1, 0, 0])

    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(Masked(), Masked(), Masked()), torch.randn(3, 6)))[1]
    assert (found.name, found.evidence) == ("forward Euler", "measured")
    assert any("mask" in note for note in found.notes)


def test_streams_with_steps_of_their_own_claim_no_common_step():
    def rule(m, x, y):
        return x + 0.2 * (m.f(x) * torch.sigmoid(m.to_first(y))), m.other(y + 0.5 * m.g(y) + torch.tanh(m.to_second(x)))

    found = middle(rule, widths=(6, 8))
    assert found.step_size is None
    assert "h = 0.2" in found.system


def test_states_that_only_answer_to_each_other_make_a_step_of_the_system():
    def rule(m, x, y):
        return x + m.f(m.to_first(y)) * torch.sigmoid(m.to_first(y)), y + torch.tanh(m.to_second(x))

    assert middle(rule, widths=(6, 10)).name == "forward Euler of 2 coupled states"


def test_states_that_are_rotated_into_each_other_are_not_damped_each():
    def rule(m, x, y):
        return 0.8 * x + 0.6 * y + m.f(m.norm(x)), -0.6 * x + 0.8 * y

    found = middle(rule)
    assert (found.name, found.evidence, found.skip) == ("general linear method of 2 states", "measured", None)
    assert found.notes[0].startswith("V = (0.8, 0.6; -0.6, 0.8), the field is that of a = (1, 0)")


def projected_position(m, x, v):
    v = 0.8 * v + m.f(m.norm(x))
    return m.norm(x + 0.5 * v), v


def momentum_and_residual(m, x, v):
    v = 0.8 * v + m.f(m.norm(x))
    x = x + 0.5 * v
    return x + m.g(m.norm(x)), v


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (projected_position, "momentum (beta = 0.8), position normalised"),
        (momentum_and_residual, "Lie splitting (momentum (beta = 0.8); 1 Euler step of the position)"),
    ],
)
def test_a_position_that_is_normalised_or_moves_further_by_itself(rule, name):
    found = middle(rule)
    assert (found.name, found.evidence) == (name, "proven")


def test_a_residual_that_reads_the_velocity_is_no_step_of_the_position_alone():
    def rule(m, x, v):
        v = 0.8 * v + m.f(m.norm(x))
        x = x + 0.5 * v
        return x + m.g(m.norm(x + v)), v

    assert "momentum" not in middle(rule).name


class Filters(nn.Module):
    """Two filters over time; the second one takes the first for its input, which does not read it."""

    def __init__(self, back):
        super().__init__()
        torch.manual_seed(0)
        self.decay, self.first, self.last, self.back = nn.Parameter(torch.rand(2, 6)), nn.Linear(3, 6), mlp(6), back

    def forward(self, x):
        a = b = x.new_zeros(len(x), 6)
        told = []
        for t in range(x.shape[1]):
            force = self.first(x[:, t])
            a = self.decay[0] * a + (force + self.last(b) if self.back else force)
            b = self.decay[1] * b + a
            told.append(torch.tanh(b))
        return torch.stack(told, 1)


@pytest.mark.parametrize("back", [False, True])
def test_a_velocity_answers_to_the_position(back):
    found = identify(trace(Filters(back).double(), torch.randn(3, 7, 3).double()))
    assert any("momentum" in record.name for record in found) == back


@pytest.mark.parametrize(
    ("damping", "name"), [(0.0, "symplectic Euler (linear oscillator)"), (1.0, "linear oscillator (")]
)
def test_oscillators_over_time_whose_entries_have_numbers_of_their_own(damping, name):
    class Oscillators(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.A, self.dt, self.B = (
                nn.Parameter(torch.rand(6)),
                nn.Parameter(torch.rand(6) / 2 + 0.1),
                nn.Linear(3, 6),
            )

        def forward(self, u):
            x = z = u.new_zeros(len(u), 6)
            told = []
            for t in range(u.shape[1]):
                z = (z + self.dt * (self.B(u[:, t]) - self.A * x)) / (1 + damping * self.dt * self.A.detach() ** 2)
                x = x + self.dt * z
                told.append(torch.tanh(x))
            return torch.stack(told, 1)

    found = identify(trace(Oscillators().double(), torch.randn(3, 7, 3).double()))
    assert sum(record.name.startswith(name) for record in found) >= 3


class Equilibrium(nn.Module):
    """Two layers that relax towards what each makes of the other (Scellier and Bengio 2017)."""

    def __init__(self):
        super().__init__()
        self.into, self.on = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        a, b = 0.1 * self.into(x), torch.zeros(len(x), 4, dtype=x.dtype)
        for _ in range(5):
            toward = torch.tanh(self.into(x) + b @ self.on.weight)
            a, b = a + 0.2 * (toward - a), b + 0.3 * (torch.tanh(self.on(a)) - b)
        return b


def test_a_number_before_what_another_state_gives_is_its_step_size():
    torch.manual_seed(0)
    found = identify(trace(Equilibrium().double(), torch.randn(3, 5, dtype=torch.float64)))
    (system,) = {r.system for r in found if r.name.startswith("damped Euler of 2 coupled states")}
    assert "running sum (a = 0.8), h = 0.2, reads old x_2" in system
    assert "running sum (a = 0.7), h = 0.3, reads old x_1" in system


class BetweenStates(nn.Module):
    """Explicit midpoint of q' = v, v' = f(q), the two parts written out."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))

    def forward(self, q):
        v = 0.5 * q
        for _ in range(6):
            q, v = q + v + 0.5 * self.f(q), v + self.f(q + 0.5 * v)
        return q


def test_a_field_that_is_evaluated_between_the_states_is_a_stage_and_not_forward_euler():
    torch.manual_seed(0)
    found = identify(trace(BetweenStates(), torch.randn(3, 6)))
    assert not [r.name for r in found if "Euler" in r.name]
