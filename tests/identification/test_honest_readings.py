"""Kinds of steps of which too much was once said: what stands behind an addition, streams, scalings, linear parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

D = 8
Step = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A block whose forward is a function of it and the state, with a field and two matrices."""

    def __init__(self, step: Step, width: int = D) -> None:
        super().__init__()
        self.step, self.width = step, width
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.g = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        S = torch.randn(width, width) / width**0.5
        self.register_buffer("A", S @ S.T / 2 + 0.1 * torch.eye(width))  # of a dissipative field -A x
        self.W = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def read(step: Step, shape: tuple[int, ...] = (2, D), depth: int = 3) -> Identification:
    """What is read off the middle one of some blocks in double precision."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(step, shape[-1]) for _ in range(depth))).double()
    found = identify(trace(model, torch.randn(*shape, dtype=torch.float64)))
    return next(r for r in found if depth // 2 in r.steps)


def test_a_gate_before_a_norm_names_a_projected_step():
    """Kuramoto oscillators on spheres: x' = P(x + h (f(x) - (x . f(x)) x))."""

    def step(m, x):
        y = m.f(x)
        return functional.normalize(x + 0.5 * (y - (x * y).sum(-1, keepdim=True) * x), dim=-1)

    found = read(step)
    assert (found.name, found.step_size, found.evidence) == ("projected Euler (post-norm)", 0.5, "measured")


@pytest.mark.parametrize("a", [4.0, -1.5])
def test_a_scaling_alone_has_no_step_size(a):
    found = identify(trace(lambda x: a * x, torch.randn(2, D)))[0]
    assert (found.name, found.step_size, found.skip) == (f"scaled state (a = {a:.3g}), no branch", None, a)
    assert "h =" not in str(found)


def test_what_is_added_last_from_outside_is_no_branch():
    """A sum with a constant after the norms sets no step size."""

    def step(m, x):
        return functional.layer_norm(x + 0.25 * m.f(x), (D,)) + m.W[0]

    found = read(step)
    assert (found.name, found.step_size) == ("projected Euler (post-norm)", 0.25)


def sinkhorn(logits: Tensor) -> Tensor:
    """A doubly stochastic matrix."""
    P = logits.exp()
    for _ in range(20):
        P = P / P.sum(-1, keepdim=True)
        P = P / P.sum(-2, keepdim=True)
    return P


def mixed(how: str) -> Step:
    """Two streams, mixed by a matrix that depends on them."""

    def step(m, x):
        streams = x.unflatten(-1, (2, -1))
        M = sinkhorn(m.f(x)[..., :4].unflatten(-1, (2, 2)))
        if how == "product":
            new = M @ streams
        elif how == "einsum":
            new = torch.einsum("bij,bjd->bid", M, streams)
        else:
            new = (M[..., None] * streams[..., None, :, :]).sum(-2)
        return (new + 0.5 * m.g(x).unflatten(-1, (2, -1))).flatten(-2)

    return step


@pytest.mark.parametrize("how", ["product", "einsum", "by hand"])
def test_a_matrix_of_the_state_on_the_skip_is_no_map_without_one(how):
    found = read(mixed(how))
    assert (found.name, found.evidence, found.method) == ("skip by a matrix of the state", "measured", None)
    if how != "by hand":
        assert "doubly stochastic" in found.notes[0]


def test_attention_with_values_that_pass_weights_is_still_plain():
    found = read(lambda m, x: torch.softmax(x @ m.W @ x.mT, -1) @ m.f(x), (2, 4, D))
    assert (found.name, found.evidence) == ("plain", "proven")


def test_the_line_shows_the_first_note_in_short():
    found = read(lambda m, x: functional.layer_norm(x + m.f(x), (D,)))
    assert str(found).endswith("; the skip passes 1 norm(s) after 1 addition(s), so no single a describes it")
