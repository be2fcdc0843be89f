"""What training on half of a batch does for the other half is told without the targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.diagnosis.remedies.held_out import Dropping, learnt
from stabkit.tracing.recording.forward_pass import ForwardPass


def called(x: Tensor) -> ForwardPass:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    return ForwardPass(model, model, (x,), {}, 0)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_rule_is_learnt_for_others_and_noise_by_heart() -> None:
    x = drawn(0, 64, 4)
    rule, noise = x[:, :1] - x[:, 1:2], drawn(1, 64, 1)
    call = called(x)
    before = [p.detach().clone() for p in call.module.parameters()]
    ruled = learnt(call, lambda out: functional.mse_loss(out, rule), 60)
    drawn_ = learnt(call, lambda out: functional.mse_loss(out, noise), 60)
    assert ruled is not None
    assert drawn_ is not None
    assert ruled.other > 0.8
    assert drawn_.other < 0.3 < drawn_.own
    assert ruled.beats(drawn_)
    assert not drawn_.beats(ruled)
    assert all(torch.equal(p, old) for p, old in zip(call.module.parameters(), before, strict=True))


def test_a_loss_that_is_no_sum_over_samples_tells_nothing() -> None:
    x = drawn(0, 32, 4)
    assert learnt(called(x), lambda out: (out - out.mean()).square().sum().sqrt(), 10) is None


def test_samples_along_the_second_axis() -> None:
    x = drawn(0, 16, 7, 3)

    class TimesFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1))

    model = TimesFirst()
    targets = x[..., :1].transpose(0, 1)
    found = learnt(ForwardPass(model, model, (x,), {}, 0), lambda out: functional.mse_loss(out, targets), 60)
    assert found is not None
    assert found.other > 0.3


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: functional.dropout(x, 0.9),
        lambda x: functional.dropout(x, p=0.9, training=True),
        lambda x: nn.Dropout(0.9)(x),
        lambda x: nn.Dropout2d(0.9)(x[None, :, None, None]),
        lambda x: torch.dropout(x, 0.9, train=True),
    ],
)
def test_dropouts_at_a_lower_share(drop: object) -> None:
    x = torch.ones(1000)
    with Dropping(0.0) as seen:
        assert bool((drop(x) == 1).all())  # type: ignore[operator]
    assert seen.dropped == [0.9]
    with Dropping(0.2):
        assert 0.1 < float((drop(x) == 0).double().mean()) < 0.3  # type: ignore[operator]


def test_dropout_that_is_off_stays_off() -> None:
    with Dropping(0.5) as seen:
        functional.dropout(torch.ones(3), 0.9, training=False)
    assert seen.dropped == [0.0]
