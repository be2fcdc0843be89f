from __future__ import annotations

import torch
from torch import Tensor, nn

from stabkit.tracing import trace
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.products.unit_cotangents import UnitPuller, linear_nodes


def segment(model: nn.Module, x: Tensor) -> Segment:
    found = trace(model.double(), x.double()).jacobian().origin
    assert found is not None
    return found.products.segment


def test_constant_factors_are_linear_nodes_and_others_are_not():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y @ y.transpose(1, 2) @ y

    found = linear_nodes(segment(Both(), torch.randn(2, 4, 4)))
    assert len(found) == 1
    assert found[0].factor == 1


def test_unit_cotangents_read_the_weight_and_others_are_multiplied():
    torch.manual_seed(0)
    layers = segment(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()), torch.randn(3, 5))
    unit = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4).contiguous()
    puller = UnitPuller(layers)
    (found,), (expected,) = puller([unit]), layers.vjp_batch([unit])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert puller.n_read == 1
    general = torch.randn(4, 3, 4, dtype=torch.float64)
    (found,), (expected,) = puller([general]), layers.vjp_batch([general])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert puller.n_read == 0


def test_parallel_layers_are_all_read():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), x.sin(), self.second(x)], dim=-1)

    torch.manual_seed(0)
    layers = segment(Parallel(), torch.randn(2, 5))
    unit = torch.eye(11, dtype=torch.float64)[:, None].expand(11, 2, 11).contiguous()
    puller = UnitPuller(layers)
    (found,), (expected,) = puller([unit]), layers.vjp_batch([unit])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert puller.n_read == 2


def test_zero_cotangents_stay_zero():
    layers = segment(nn.Linear(5, 6), torch.randn(3, 5))
    (found,) = UnitPuller(layers)([torch.zeros(2, 3, 6, dtype=torch.float64)])
    assert torch.equal(found, torch.zeros(2, 3, 5, dtype=torch.float64))
