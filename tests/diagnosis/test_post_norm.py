"""Deep stacks with their norms behind the additions, which a short training shows not to train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import apply
from stabkit.diagnosis.depth.post_norm import post_norm_findings
from stabkit.diagnosis.measurement import measure
from stabkit.diagnosis.remedies.alternatives import deep_norm


class Block(nn.Module):
    """LN(x + f(x)), written by hand and without an option to move the norm."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def encoder(norm_first: bool, depth: int = 14, d: int = 16) -> nn.Module:
    """Layers of torch with Xavier's weights, as many people make them, and a head."""
    torch.manual_seed(0)
    make = nn.TransformerEncoderLayer
    layers = [make(d, 2, 32, 0.0, batch_first=True, norm_first=norm_first) for _ in range(depth)]
    model = nn.Sequential(nn.Embedding(12, d), *layers, nn.Linear(d, 12))
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    return model


def copying() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    tokens = torch.randint(0, 12, (8, 8), generator=torch.Generator().manual_seed(1))
    return tokens, lambda out: nn.functional.cross_entropy(out.transpose(1, 2), tokens.flip(1))


def test_a_deep_post_norm_stack_that_does_not_train_is_named_and_trains_with_the_norm_in_the_branch():
    model, (tokens, loss) = encoder(False), copying()
    flow = stabkit.trace(model, tokens, check=False)
    (found,) = post_norm_findings(flow, measure(flow, loss), loss)
    assert (found.kind, found.severity) == ("post_norm", "warning")
    assert found.numbers["additions"] == 28
    assert found.numbers["treated"] < 0.75 * found.numbers["untreated"] / 0.75
    assert "tried on a copy" in found.evidence
    assert not model[1].norm_first
    assert apply(model, found) == 14
    assert model[1].norm_first
    flow = stabkit.trace(model, tokens, check=False)
    assert post_norm_findings(flow, measure(flow, loss), loss) == []


def test_shallow_stacks_and_those_without_a_loss_cost_nothing(monkeypatch):
    monkeypatch.setattr("stabkit.diagnosis.depth.post_norm.short_training", lambda *_: pytest.fail("trained"))
    tokens, loss = copying()
    for depth, given in ((4, loss), (14, None)):
        flow = stabkit.trace(encoder(False, depth), tokens, check=False)
        assert post_norm_findings(flow, measure(flow, given), given) == []


def test_alpha_is_the_same_as_smaller_branches():
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Block(8) for _ in range(16)]), torch.randn(4, 8)
    remedy = deep_norm(measure(stabkit.trace(model, x, check=False)).steps)
    assert remedy is not None
    assert "alpha = (2N)^(1/4) = 2" in remedy.text
    assert {action["parameter"].split(".", 1)[1] for action in remedy.actions} == {"down.weight", "down.bias"}
    h = x
    for block in model:
        h = block.norm(2.0 * h + block.down(torch.relu(block.up(h))))
    with torch.no_grad():
        for action in remedy.actions:
            model.get_parameter(action["parameter"]).mul_(action["factor"])
    assert torch.allclose(model(x), h, atol=1e-4)


def test_where_plain_descent_tells_nothing_adam_decides():
    """Twenty steps of plain descent leave both at the loss of equal chances; 150 of Adam reach 2.0 and .003."""
    tokens = torch.randint(0, 12, (64, 8), generator=torch.Generator().manual_seed(1))
    model = encoder(False, 18)
    model[0].reset_parameters()
    model[-1].reset_parameters()
    flow = stabkit.trace(model, tokens, check=False)
    loss = lambda out: nn.functional.cross_entropy(out.transpose(1, 2), tokens.flip(1))  # noqa: E731
    (found,) = post_norm_findings(flow, measure(flow, loss), loss)
    assert "Adam" in found.evidence
    assert {action["option"] for action in found.actions} == {"norm_first"}
