from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.tracing import Flow, trace
from stabkit.tracing.graph.values import Meta
from stabkit.tracing.products.site_labels import Sites, axis_labels, entries_by_site, possible_labels, pulled_labels


def whole(flow: Flow):
    found = flow.jacobian().origin
    assert found is not None
    return found.products


@pytest.mark.parametrize("tokens", [4, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_that_stay_apart_keep_their_labels(tokens, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU()).to(dtype)
    products = whole(trace(model, torch.randn(2, tokens, 6, dtype=dtype)))
    sites = Sites(2, tokens)
    labels = axis_labels(products.target, 0, sites)
    assert labels.view(2, tokens, 9)[1, 3].unique().tolist() == [tokens + 3]
    (found,) = pulled_labels(products.segment, [labels], sites.count)
    assert torch.equal(found, torch.arange(2 * tokens).repeat_interleave(6))


@pytest.mark.parametrize("mix", [lambda x: x.cumsum(1), lambda x: x - 1e-9 * x.mean(1, keepdim=True)])
def test_tokens_that_are_mixed_however_little_are_told(mix):
    products = whole(trace(lambda x: mix(x.sin()), torch.randn(2, 5, 6, dtype=torch.float64)))
    assert pulled_labels(products.segment, [axis_labels(products.target, 0, Sites(2, 5))], 10) is None


def test_labels_follow_entries_that_move():
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    products = whole(trace(lambda x: x.sin().transpose(1, 2).roll(1, 1), x))
    (found,) = pulled_labels(products.segment, [axis_labels(products.target, 1, Sites(1, 4))], 4)
    assert found.view(3, 4)[0].tolist() == [1, 2, 3, 0]


def test_what_nothing_comes_from_has_no_site():
    def half(x: Tensor) -> Tensor:
        return torch.cat([x[..., :2], 0 * x[..., 2:]], dim=-1)

    products = whole(trace(half, torch.randn(1, 3, 4, dtype=torch.float64)))
    (found,) = pulled_labels(products.segment, [axis_labels(products.target, 1, Sites(1, 3))], 3)
    assert found.view(3, 4)[1].tolist() == [1, 1, -1, -1]
    assert entries_by_site(found, 3) is None


def test_joined_axes_may_count_sites_in_either_order():
    def options(*shape: int) -> list[list[int]]:
        meta = Meta(shape, torch.float32, torch.device("cpu"))
        return [labels.tolist() for labels in possible_labels(meta, Sites(2, 3))]

    assert options(2, 3) == [[0, 1, 2, 3, 4, 5]]
    assert options(3, 2) == [[0, 3, 1, 4, 2, 5]]
    assert options(6) == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]]
    assert options(4, 5) == []
