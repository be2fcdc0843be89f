"""Skips that are linear maps of the state's own space: no change of space, and no skip where they act on others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import Step, dense

STREAMS, SAMPLES, TOKENS, WIDTH = 4, 3, 5, 8


def doubly_stochastic():
    M = torch.rand(STREAMS, STREAMS) + 0.1
    for _ in range(200):
        M = M / M.sum(0, keepdim=True)
        M = M / M.sum(1, keepdim=True)
    return M


class Connected(nn.Module):
    """One branch of static hyper-connections (Zhu et al. 2024): streams mixed by a matrix, read and written by rows."""

    def __init__(self, idiom):
        super().__init__()
        self.M, self.idiom = nn.Parameter(doubly_stochastic()), idiom
        self.read, self.write = (nn.Parameter(torch.rand(STREAMS).softmax(0)) for _ in range(2))
        self.f = dense(WIDTH)

    def forward(self, x):
        return self.idiom(self, x)


def folded(m, x):
    x = x.view(-1, STREAMS, TOKENS, WIDTH)
    y = m.f(torch.einsum("s,bstd->btd", m.read, x))
    return (torch.einsum("st,bsld->btld", m.M, x) + torch.einsum("btd,s->bstd", y, m.write)).flatten(0, 1)


def folded_slowly(m, x):
    x = x.view(STREAMS, -1, TOKENS, WIDTH)
    y = m.f((m.read.view(-1, 1, 1, 1) * x).sum(0))
    return (torch.tensordot(m.M.mT, x, 1) + m.write.view(-1, 1, 1, 1) * y).flatten(0, 1)


def on_an_axis(m, x):
    y = m.f(torch.einsum("s,bstd->btd", m.read, x))
    return (m.M.mT @ x.flatten(2)).view_as(x) + m.write.view(-1, 1, 1) * y.unsqueeze(1)


@pytest.mark.parametrize("per_block", [1, 2, 3])
@pytest.mark.parametrize("idiom", [folded, folded_slowly, on_an_axis])
def test_streams_that_numbers_mix_are_a_general_linear_method(idiom, per_block):
    torch.manual_seed(0)
    blocks = [nn.Sequential(*(Connected(idiom) for _ in range(per_block))) for _ in range(3)]
    shape = (SAMPLES, STREAMS, TOKENS, WIDTH) if idiom is on_an_axis else (SAMPLES * STREAMS, TOKENS, WIDTH)
    model = nn.Sequential(*blocks).double()
    found = identify(trace(model, torch.randn(*shape, dtype=torch.float64), depth=["0", "1", "2"], batch_dim=None))
    name = f"general linear method of {STREAMS} streams"
    assert {record.name for record in found} == {name if per_block == 1 else f"{per_block} times {name}"}
    for record, block in zip(found, blocks, strict=True):
        V = np.linalg.multi_dot([np.eye(STREAMS), *(m.M.detach().numpy().T for m in reversed(block)), np.eye(STREAMS)])
        assert np.allclose(record.method.V, V, atol=1e-8)
        first, last = block[0].read.detach().numpy(), block[-1].write.detach().numpy()
        assert np.allclose(record.method.U[0], first / np.abs(first).max())
        assert np.allclose(record.method.B[:, -1], last / np.abs(last).max())
        if per_block > 1:  # what the second branch reads of the first
            second, write = block[1].read.detach().numpy(), block[0].write.detach().numpy()
            assert np.isclose(record.method.A[1, 0], second @ write / second.max() / write.max())


def linear():
    return nn.Linear(WIDTH, WIDTH)


def groups(x):
    return functional.normalize(x.unflatten(-1, (-1, 4)), dim=-1).flatten(-2)


def rectified(m, x):
    return torch.relu(m.parts[0](x) + m.parts[1](x))


def twice(m, x):
    x = m.parts[0](x) + m.parts[1](x)
    return m.parts[2](x) + m.parts[3](x)


def read(function, *parts, shape=(SAMPLES, WIDTH)):
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(function, *(part() for part in parts)) for _ in range(3))).double().eval()
    return identify(trace(model, torch.randn(*shape, dtype=torch.float64), depth=["0", "1", "2"]))[1]


@pytest.mark.parametrize(
    ("function", "parts", "after"),
    [(rectified, (linear, lambda: dense(WIDTH)), True), (twice, (linear, lambda: dense(WIDTH)) * 2, False)],
)
def test_a_projection_within_one_space_is_a_linear_map_of_the_state(function, parts, after):
    record = read(function, *parts)
    assert (record.name, record.evidence, bool(record.after)) == ("linear skip", "proven", after)
    assert "linear map of the state" in record.notes[0]
    assert not any("change of space" in note or "no step" in note for note in record.notes)


def inside(m, x):
    y = m.parts[2](torch.tanh(m.parts[3](x)))
    return m.parts[0](y) + m.parts[1](y)


def bent_after(m, x):
    y = m.parts[0](x) + m.parts[1](x)
    return m.parts[3](torch.tanh(m.parts[2](y)))


@pytest.mark.parametrize("function", [inside, bent_after])
def test_a_linear_map_of_a_value_inside_is_no_skip_of_the_state(function):
    record = read(function, linear, lambda: dense(WIDTH), linear, linear)
    assert record.name == "plain"


def turned(m, x):
    M = m.parts[0].weight[:4, :4]
    return torch.einsum("ij,bgj->bgi", M - M.mT, x.unflatten(-1, (-1, 4))).flatten(-2)


def oscillators(m, x):
    """Artificial Kuramoto neurons (Miyato et al. 2024): turned and pulled on spheres of four entries."""
    xg, yg = (t.unflatten(-1, (-1, 4)) for t in (x, m.parts[1](x)))
    return groups(x + turned(m, x) + (yg - (xg * yg).sum(-1, keepdim=True) * xg).flatten(-2))


@pytest.mark.parametrize("on_spheres", [True, False])
def test_a_bare_state_beside_a_matrix_of_it_is_a_step_of_a_field_with_a_linear_part(on_spheres):
    norm = groups if on_spheres else lambda x: x
    record = read(lambda m, x: norm(x + turned(m, x) + m.parts[1](x)), linear, lambda: dense(WIDTH))
    name = "projected Euler (post-norm)" if on_spheres else "forward Euler, parallel branches"
    assert (record.name, record.evidence) == (name, "proven")
    assert record.method.V[0, 0] == 1.0


def several_rounds(m, x):
    x = groups(m.parts[2](torch.relu(m.parts[3](x))) * 0.1 + x)
    for _ in range(3):
        x = oscillators(m, x)
    return x


def read_out_before(m, x):
    c, x = m.parts[2](torch.relu(m.parts[3](x))), groups(x)
    for _ in range(2):
        x = groups(x + turned(m, x) + m.parts[1](x) + c)
    return x


@pytest.mark.parametrize("function", [several_rounds, read_out_before, lambda m, x: oscillators(m, groups(x))])
def test_rounds_between_norms_are_no_projection_and_no_map_without_a_skip(function):
    record = read(function, linear, lambda: dense(WIDTH), linear, linear)
    assert record.name not in ("linear skip", "plain", "projection shortcut")


def taken(x):
    return x[:, 0]


def differences(x):
    return 2 * x[:, 1] - x[:, 0]


def pooled(x):
    return x.mean(1)


def added(x):
    return x[:, 0] + x[:, 1]


@pytest.mark.parametrize("shortcut", [taken, differences, pooled, added])
def test_a_combination_of_entries_takes_none_of_them(shortcut):
    model = nn.Sequential(Step(lambda m, x: shortcut(x) + m.parts[0](x.flatten(1)), nn.Linear(2 * WIDTH, WIDTH)))
    (record,) = identify(trace(model, torch.randn(SAMPLES, 2, WIDTH)))
    assert record.name == "transition"
    assert ("takes or pads entries" in record.notes[0]) == (shortcut is taken)


def test_what_is_rectified_is_a_gradient_step_of_a_gradient_alone():
    record = read(lambda m, x: torch.relu(x + m.parts[0](x)), lambda: dense(WIDTH))
    assert any("if f is a gradient" in note for note in record.notes)
