"""Several calls of one network at one point, combined with weights: one field of classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit


class _Guided(nn.Module):
    """A flow that is followed in steps of several sizes, with and without a condition."""

    def __init__(self, how: str, scale: float = 2.0) -> None:
        super().__init__()
        self.how, self.scale = how, scale
        self.inner, self.cond, self.out = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 4)
        self.register_buffer("y", torch.randn(2, 3))
        self.sizes = (0.125, 0.25, 0.25, 0.375)

    def net(self, x: Tensor, y: Tensor, t: float) -> Tensor:
        return self.out(torch.tanh(self.inner(x) + self.cond(y) + t))

    def field(self, x: Tensor, t: float) -> Tensor:
        if self.how == "copies":
            conditions = torch.cat([self.y, torch.zeros_like(self.y)])
            with_it, without = self.net(torch.cat([x, x]), conditions, t).chunk(2)
            return without + self.scale * (with_it - without)
        with_it, without = self.net(x, self.y, t), self.net(x, torch.zeros_like(self.y), t)
        return without + self.scale * (with_it - without)

    def forward(self, x: Tensor) -> Tensor:
        t = 0.0
        for h in self.sizes:
            if self.how == "heun":
                k = self.field(x, t)
                x = x + h / 2 * (k + self.field(x + h * k, t + h))
            else:
                x = x + h * self.field(x, t)
            t += h
        return x


@pytest.mark.parametrize("scale", [2.0, 7.5, 0.5])
@pytest.mark.parametrize(("how", "name"), [("euler", "forward Euler"), ("heun", "heun2")])
def test_guidance_is_one_field(how: str, name: str, scale: float) -> None:
    """The weights of the calls sum to one, and the step size is that of the sampler."""
    torch.manual_seed(0)
    model = _Guided(how, scale).double()
    found = [r for r in stabkit.identify(stabkit.trace(model, torch.randn(2, 4).double())) if r.name == name]
    for record, h in zip(found, model.sizes, strict=True):
        assert record.step_size == pytest.approx(h)
        assert record.evidence == "proven"
        assert any(f"with weights {1 - scale:.3g} and {scale:.3g}" in n or f"{scale:.3g} and {1 - scale:.3g}" in n
                   for n in record.notes)  # fmt: skip


@pytest.mark.parametrize("scale", [2.0, 7.5])
def test_a_doubled_batch_is_one_field_too(scale: float) -> None:
    """Both conditions in one call: the weights of the copies are no steps of channels."""
    torch.manual_seed(0)
    model = _Guided("copies", scale).double()
    found = stabkit.identify(stabkit.trace(model, torch.randn(2, 4).double()))
    assert [record.step_size for record in found] == pytest.approx(model.sizes)
    assert not any("LayerScale" in note for record in found for note in record.notes)


def test_both_ends_of_an_edge_are_fields_of_their_own() -> None:
    """One evaluation that is added to both of its ends is no network that is called twice."""

    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            g = self.message(x[:, [0, 1, 2]] - x[:, [1, 2, 3]])
            return x.index_add(1, torch.tensor([0, 1, 2]), g).index_add(1, torch.tensor([1, 2, 3]), 2 * g)

    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(nn.Sequential(*(Edges() for _ in range(3))), torch.randn(2, 4, 3)))
    assert not any("guidance" in note for record in found for note in record.notes)
