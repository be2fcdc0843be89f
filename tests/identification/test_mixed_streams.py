"""Streams on an axis of a state, mixed by matrices that are made of one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import dense

STREAMS, SAMPLES, TOKENS, WIDTH = 3, 2, 5, 8


class Predicted(nn.Module):
    """Predict all streams, compute on one of them, correct all (Baykal et al. 2023)."""

    def __init__(self, axis, product, square, kept=1.0):
        super().__init__()
        self.axis, self.product, self.square, self.kept = axis, product, square, kept
        self.router, self.gains = nn.Linear(WIDTH, STREAMS**2), nn.Linear(WIDTH, STREAMS)
        self.f = dense(WIDTH)

    def forward(self, x):
        x = x.movedim(self.axis, 0)
        M = self.router(x[0]).tanh().unflatten(-1, (STREAMS, STREAMS))
        M = M.softmax(-1) if self.square else M
        predicted = self.product(M, x) + self.kept * x if self.kept else self.product(M, x)
        one = predicted[0] + self.f(predicted[0])
        gains = 1 + self.gains(one).movedim(-1, 0).unsqueeze(-1)
        return (predicted + gains * (one - predicted[0])).movedim(0, self.axis)


def by_matmul(M, x):
    return torch.matmul(x.permute(1, 2, 3, 0), M).permute(3, 0, 1, 2)


def by_einsum(M, x):
    return torch.einsum("btij,ibtd->jbtd", M, x)


def by_hand(M, x):
    return torch.stack([sum(M[..., i, j, None] * x[i] for i in range(STREAMS)) for j in range(STREAMS)])


SPELLINGS = [(0, by_matmul, False), (1, by_matmul, True), (1, by_einsum, False), (2, by_einsum, True)]


def read(axis, product, square, kept):
    torch.manual_seed(0)
    model = nn.Sequential(*(Predicted(axis, product, square, kept) for _ in range(3)))
    x = torch.randn(STREAMS, SAMPLES, TOKENS, WIDTH).movedim(0, axis)
    return identify(trace(model, x, depth=["0", "1", "2"], batch_dim=None))


@pytest.mark.parametrize(("axis", "product", "square"), SPELLINGS)
def test_a_matrix_of_one_stream_that_is_added_to_all_as_they_are_makes_a_splitting(axis, product, square):
    found = read(axis, product, square, 1.0)
    name = "Lie splitting (2 Euler steps), streams mixed by a matrix of the state"
    assert {(record.name, record.skip) for record in found} == {(name, 1.0)}
    assert all("beside the identity" in record.notes[0] for record in found)


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize(("axis", "product", "square"), SPELLINGS)
def test_streams_that_a_matrix_of_one_of_them_mixes_are_no_euler_steps_without_the_identity(
    axis, product, square, kept
):
    found = read(axis, product, square, kept)
    assert {(record.name, record.evidence) for record in found} == {("skip by a matrix of the state", "measured")}


@pytest.mark.parametrize("axis", [0, 2])
def test_streams_that_are_mixed_by_hand_are_not_called_proven(axis):
    torch.manual_seed(0)
    model = nn.Sequential(*(Predicted(axis, by_hand, False) for _ in range(3)))
    x = torch.randn(STREAMS, SAMPLES, TOKENS, WIDTH).movedim(0, axis)
    found = identify(trace(model, x, depth=["0", "1", "2"], batch_dim=None))
    assert not [record for record in found if record.evidence == "proven"]


def test_a_field_that_multiplies_the_state_by_a_matrix_of_its_entries_stays_a_field():
    class Body(nn.Module):
        """Euler's equations of a rigid body, by a skew matrix."""

        def forward(self, x):
            w, zero = x * torch.tensor([1.0, 0.5, 0.3]), torch.zeros_like(x[:, 0])
            rows = [(zero, -w[:, 2], w[:, 1]), (w[:, 2], zero, -w[:, 0]), (-w[:, 1], w[:, 0], zero)]
            return x - 0.1 * (torch.stack([torch.stack(row, -1) for row in rows], -2) @ x[..., None])[..., 0]

    found = identify(trace(nn.Sequential(*(Body() for _ in range(3))), torch.randn(SAMPLES, 3), depth=["0", "1", "2"]))
    assert all(record.name.startswith("forward Euler") for record in found)


def test_attention_without_weights_of_its_own_stays_a_field():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = dense(WIDTH)

        def forward(self, x):
            x = x + torch.softmax(x @ x.mT / WIDTH**0.5, -1) @ x
            return x + self.f(x)

    torch.manual_seed(0)
    model = nn.Sequential(*(Attention() for _ in range(3)))
    found = identify(trace(model, torch.randn(SAMPLES, TOKENS, WIDTH), depth=["0", "1", "2"]))
    assert {record.name for record in found} == {"Lie splitting (2 Euler steps)"}


def test_a_product_of_two_vectors_has_no_matrix_to_mix_with():
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(torch.dot(x, x)) * torch.stack([x[1] - x[0], x[2], x[0] * x[1]])

    records = identify(trace(nn.Sequential(Turned(), Turned()), torch.randn(3), batch_dim=None))
    assert all(record.evidence != "proven" for record in records)
