"""What is made of the inputs off the graph is followed to where it meets the graph again, or Python reads it."""

from __future__ import annotations

import pytest
import torch

from stabkit.tracing import trace
from stabkit.tracing.recording.off_graph import INPUT
from stabkit.tracing.recording.recorder import Recording

N = torch.tensor([3, 2])


def recorded(function, *given) -> Recording:
    return trace(function, torch.rand(2, 3) + 1.0, *given, source="0").recorded.recording


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: x * (torch.arange(3) < n[:, None]),
        lambda x, n: x * torch.softmax(n.float(), 0)[:, None],
        lambda x, n: torch.where((torch.arange(3) >= n[:, None]).logical_not(), x, 0.0),
        lambda x, n: x.mul_(torch.zeros(2, 3).copy_(n[:, None].expand(2, 3))),
    ],
)
def test_what_an_input_without_gradient_makes_is_followed(function):
    assert set().union(*recorded(function, N).fed.values()) == {INPUT}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.detach(),
        lambda x: x * (x > 1.5),
        lambda x: x * _off_graph(x),
        lambda x: x / x.detach().abs().amax(-1, keepdim=True),
    ],
)
def test_what_leaves_the_graph_is_followed_back_to_where_it_left(function):
    found = recorded(function)
    (origins,) = found.fed.values()
    assert origins == {found.sources[0].value.node._sequence_nr()}


def _off_graph(x):
    with torch.no_grad():
        return x.sin() + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: x * torch.ones_like(n)[:, None],
        lambda x, n: x * torch.arange(3),
        lambda x, n: x.sin() * 0.5,
        lambda x, n: x * torch.zeros(n.shape[0], 1),
    ],
)
def test_what_depends_on_no_value_of_an_input_is_not(function):
    assert not recorded(function, N).fed


@pytest.mark.parametrize(
    ("function", "reads"),
    [
        (lambda x, n: x * n[0].item(), 1),
        (lambda x, n: x * float(n[0]) if (n > 1).all() else x, 2),
        (lambda x, n: x * n.tolist()[0], 1),
        (lambda x, n: x * float(x.detach().numpy()[0, 0]), 1),
        (lambda x, n: x * (1.0 if torch.equal(n, n + 1) else 2.0), 1),
        (lambda x, n: x * torch.tensor(2.0).item(), 0),
        (lambda x, n: x * n.shape[0], 0),
    ],
)
def test_where_python_reads_numbers_is_noted(function, reads):
    assert len(recorded(function, N).read) == reads
