"""Norms inside a step: whether a skip leads around it is measured before it is denied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import Step, dense

WIDTH = 12


class HandNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def read(make, samples=4, batch_dim=0):
    """The records of three blocks, of which batch norms have seen some batches."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(make() for _ in range(3))), torch.randn(samples, WIDTH)
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.randn(32, WIDTH) * 2 + 1)
    return model.eval(), identify(trace(model, x, depth=["0", "1", "2"], batch_dim=batch_dim))


def two_branches(m, x):
    return 0.7 * m.parts[2](x + m.parts[0](x)) + 0.3 * m.parts[3](x + m.parts[1](x))


def two_branches_and_a_layer(m, x):
    u = two_branches(m, x)
    return m.parts[5](u + m.parts[4](u))


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), HandNorm, lambda: nn.RMSNorm(WIDTH)])
@pytest.mark.parametrize("forward", [two_branches, two_branches_and_a_layer])
def test_branches_that_are_normed_each_by_itself_are_projected_steps_side_by_side(norm, forward):
    _, found = read(lambda: Step(forward, dense(WIDTH), dense(WIDTH), norm(), norm(), dense(WIDTH), norm()))
    assert {record.name for record in found} == {"projected Euler (post-norm), parallel branches"}
    assert all(record.skip is None and "0.7, 0.3" in record.notes[0] for record in found)


def test_a_norm_between_sums_of_another_kind_is_no_map_without_a_skip():
    def forward(m, x):
        return m.parts[1](x + m.parts[0](x)) + m.parts[2](m.parts[3](x) * torch.sigmoid(m.parts[4](x)))

    parts = (dense(WIDTH), nn.LayerNorm(WIDTH), dense(WIDTH), dense(WIDTH), dense(WIDTH))
    _, found = read(lambda: Step(forward, *parts))
    assert {record.name for record in found} == {"transformed skip"}
    assert found[0].evidence == "measured"
    assert "NativeLayerNorm" in found[0].notes[0]


@pytest.mark.parametrize("way", ["two branches", "one", "a layer behind"])
def test_norms_with_fixed_statistics_are_factors_and_no_projections(way):
    def forward(m, x):
        if way == "one":
            return m.parts[1](x + m.parts[0](x))
        u = m.parts[1](x + m.parts[0](x)) + m.parts[3](x + m.parts[2](x))
        return m.parts[5](u + m.parts[4](u)) if way == "a layer behind" else u

    def norm():
        return nn.BatchNorm1d(WIDTH)

    def make():
        return Step(forward, dense(WIDTH), norm(), dense(WIDTH), norm(), dense(WIDTH), norm())

    model, found = read(make)
    for block, record in zip(model, found, strict=True):
        a, b, c = (1 / torch.sqrt(block.parts[i].running_var + block.parts[i].eps) for i in (1, 3, 5))
        expected = {"one": a, "two branches": a + b, "a layer behind": c * (a + b)}[way]
        assert record.name.startswith("diagonal skip")
        assert record.evidence == "measured"
        assert record.skip == pytest.approx(float(expected.mean()), rel=1e-5)


def test_norms_that_look_at_the_batch_stay_projections():
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(lambda m, x: m.parts[1](x + m.parts[0](x)), dense(WIDTH), nn.BatchNorm1d(WIDTH))
                            for _ in range(3))).train()  # fmt: skip
    found = identify(trace(model, torch.randn(8, WIDTH), depth=["0", "1", "2"], batch_dim=None))
    assert {record.name for record in found} == {"projected Euler (post-norm)"}


def test_a_residual_between_weights_is_no_skip_but_a_linear_map():
    def forward(m, x):
        u = m.parts[0](x)
        return m.parts[1](u + torch.relu(m.parts[2](u)))

    _, found = read(lambda: Step(forward, *(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    assert {(record.name, record.skip, record.evidence) for record in found} == {("plain", 0.0, "measured")}
    assert "no skip leads around the whole step but a linear map" in found[0].notes[0]


def test_a_residual_between_weights_and_norms_is_no_skip():
    def forward(m, x):
        u = m.parts[0](x)
        return m.parts[1](m.parts[2](u + torch.relu(m.parts[3](u))))

    layers = (nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    _, found = read(lambda: Step(forward, *layers))
    assert {(record.name, record.skip, record.evidence) for record in found} == {("plain", 0.0, "proven")}
    assert "no skip leads around the whole step" in found[0].notes[0]


def test_a_fresh_norm_with_fixed_statistics_has_one_number_for_all_entries():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.norm = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.f(x))

    torch.manual_seed(0)
    for record in identify(trace(nn.Sequential(Block(), Block()).eval(), torch.randn(4, 8))):
        assert "diagonal" not in record.name
        assert not any("every entry has a number" in note for note in record.notes)
