"""Branches that data choose are those of one input; what data choose inside a field is the field's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.tracing import trace

D = 8


class Routed(nn.Module):
    """Experts that a router chooses, in the idiom that is asked for."""

    def __init__(self, idiom: str) -> None:
        super().__init__()
        self.idiom = idiom
        self.router, self.shared = nn.Linear(D, 3), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        scores = self.router(flat).softmax(-1)
        if self.idiom == "expert choice":
            out = torch.zeros_like(flat)
            gates, rows = scores.t().topk(2, dim=-1)
            for expert, gate, row in zip(self.experts, gates, rows, strict=True):
                out = out.index_add(0, row, gate[:, None] * expert(flat[row]))
            return x + out.view_as(x)
        if self.idiom == "early exit":
            active = scores.max(-1).values > 0.4
            return torch.where(active[:, None], flat + self.shared(flat), flat).view_as(x)
        if self.idiom == "routed in place":
            out = flat.clone()
            chosen = scores.argmax(-1)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero().squeeze(-1)
                out[rows] = out[rows] + expert(flat[rows])
            return out.view_as(x)
        kept = self.shared(flat)  # the field rectifies by a mask of its own, and all rows take part
        return (flat + self.experts[0](kept.masked_fill(kept < 0, 0.0))).view_as(x)


@pytest.mark.parametrize("idiom", ["expert choice", "early exit", "routed in place"])
def test_what_data_choose_is_not_proven(idiom):
    torch.manual_seed(0)
    flow = trace(nn.Sequential(*(Routed(idiom) for _ in range(3))).double(), torch.randn(2, 5, D, dtype=torch.float64))
    for found in identify(flow):
        assert found.evidence != "proven", found


def test_a_mask_inside_a_field_is_the_fields_own():
    torch.manual_seed(0)
    flow = trace(nn.Sequential(*(Routed("relu") for _ in range(3))).double(), torch.randn(2, 5, D, dtype=torch.float64))
    assert [(found.name, found.evidence) for found in identify(flow)] == 3 * [("forward Euler", "proven")]


class Beside(nn.Module):
    """A residual step whose state is scaled where gradients do not look, or masked by a comparison with itself."""

    def __init__(self, idiom: str) -> None:
        super().__init__()
        self.f, self.idiom = nn.Linear(D, D), idiom

    def forward(self, x: Tensor) -> Tensor:
        out = x + torch.tanh(self.f(x))
        if self.idiom == "detached scaling":
            return out - 0.3 * out.detach()
        if self.idiom == "normalised by a detached size":
            return out / out.detach().abs().amax(-1, keepdim=True)
        if self.idiom == "mask of the living":
            return out * (out.abs().amax(-1, keepdim=True) > 1e-9).to(out.dtype)
        seen = out.detach().abs().mean()  # looked at, and not used
        assert bool(seen.isfinite())
        return x + torch.tanh(self.f(x)) * (x.detach() > 0).to(x.dtype)  # the field's own mask


@pytest.mark.parametrize("idiom", ["detached scaling", "normalised by a detached size", "mask of the living"])
def test_a_state_that_is_scaled_where_gradients_do_not_look_is_not_proven(idiom):
    torch.manual_seed(0)
    flow = trace(nn.Sequential(*(Beside(idiom) for _ in range(3))).double(), torch.randn(4, D, dtype=torch.float64))
    for found in identify(flow):
        assert found.evidence != "proven", found


def test_what_is_cut_off_inside_a_field_or_merely_looked_at_is_proven_as_before():
    torch.manual_seed(0)
    flow = trace(nn.Sequential(*(Beside("field") for _ in range(3))).double(), torch.randn(4, D, dtype=torch.float64))
    assert {(found.name, found.evidence) for found in identify(flow)} == {("forward Euler", "proven")}
