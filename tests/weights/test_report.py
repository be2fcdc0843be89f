from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.weights import analyze_weights


def matrix(name: str, tensors: dict, **options):
    return {m.name: m for m in analyze_weights(tensors, **options).matrices}[name]


def test_singular_values_stable_rank_and_scale_of_a_known_matrix():
    U, _ = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = matrix("layer.weight", {"layer.weight": U * torch.tensor([4.0, 2.0, 1.0])})
    assert np.allclose(found.singular_values, [4, 2, 1])
    assert found.stable_rank == pytest.approx(21 / 16)
    assert found.smallest_singular_value == pytest.approx(1)
    # 6 outputs: a random cotangent g has |W^T g|^2 = |W|_F^2 / 6 |g|^2 on average
    assert found.linear_growth == pytest.approx(0.5 * math.log(21 / 6))


def test_a_large_matrix_has_its_largest_singular_value_and_says_how():
    W = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    W[:, 0] *= 10
    found = matrix("big.weight", {"big.weight": W})
    assert found.method == "golub-kahan"
    assert found.converged
    assert found.largest_singular_value == pytest.approx(float(torch.linalg.svdvals(W.double())[0]), rel=1e-4)
    assert found.smallest_singular_value is None


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2.0), ("linear", 1.0)])
def test_critical_initialisation_has_no_growth(activation, gain):
    W = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) * math.sqrt(gain / 300)
    for factor in (1.0, 3.0):
        found = matrix("w.weight", {"w.weight": factor * W}, activation=activation)
        assert found.expected_growth == pytest.approx(math.log(factor), abs=0.01)
    assert found.phase == "chaotic"


def test_the_growth_of_random_relu_layers_is_what_a_backward_pass_measures():
    torch.manual_seed(0)
    layers = [nn.Linear(200, 200, bias=False) for _ in range(10)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(3 / 200))
    x = torch.randn(64, 200, requires_grad=True)
    y = x
    for layer in layers:
        y = torch.relu(layer(y))
    (g,) = torch.autograd.grad(y, x, torch.randn_like(y))
    measured = float(g.norm(dim=1).log().mean()) - 0.5 * math.log(200)
    report = analyze_weights(nn.Sequential(*layers).state_dict())
    assert sum(m.expected_growth for m in report.matrices) == pytest.approx(measured, abs=0.3)


@pytest.mark.parametrize(
    ("module", "gates"),
    [(nn.RNN(3, 5), 1), (nn.GRU(3, 5), 3), (nn.LSTM(3, 5, num_layers=2), 4), (nn.LSTMCell(3, 5), 4)],
)
def test_recurrent_matrices_have_their_eigenvalues_gate_by_gate(module, gates):
    state = module.state_dict()
    name = "weight_hh" if isinstance(module, nn.LSTMCell) else "weight_hh_l0"
    found = matrix(name, state)
    assert len(found.eigenvalues) == gates
    for block, values in zip(state[name].double().chunk(gates), found.eigenvalues, strict=True):
        assert np.allclose(np.sort_complex(values), np.sort_complex(np.linalg.eigvals(block.numpy())))
    assert found.spectral_radius == pytest.approx(max(abs(z) for block in found.eigenvalues for z in block))
    assert not matrix(name.replace("hh", "ih"), state).eigenvalues


def test_kinds_are_read_from_names_and_shapes():
    tensors = {
        "wte.weight": torch.randn(50, 8),
        "attn.c_attn.weight": torch.randn(8, 24),
        "attn.c_attn.bias": torch.randn(24),
        "conv.weight": torch.randn(4, 3, 5, 5),
        "cls_token": torch.randn(1, 1, 8),
        "norm.weight": torch.ones(8),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "empty": torch.ones(0, 3),
    }
    report = analyze_weights(tensors, activation="linear")
    found = {m.name: m for m in report.matrices}
    assert list(found) == ["attn.c_attn.weight", "conv.weight", "wte.weight"]
    assert report.others == 5
    assert found["conv.weight"].fan_in == 75
    assert found["wte.weight"].expected_growth is None
    transposed = found["attn.c_attn.weight"]
    assert transposed.fan_in == 8
    assert any("inputs x outputs" in note for note in transposed.notes)
    assert transposed.sigma_w == pytest.approx(float(tensors["attn.c_attn.weight"].norm()) / math.sqrt(24), rel=1e-5)


def test_the_order_is_that_of_numbers():
    tensors = {f"layers.{i}.weight": torch.eye(2) for i in (10, 2, 1)}
    assert [m.name for m in analyze_weights(tensors).matrices] == [f"layers.{i}.weight" for i in (1, 2, 10)]


def test_not_a_number_is_named_wherever_it_is():
    tensors = {"a.weight": torch.full((2, 2), math.nan), "b.bias": torch.tensor([math.inf]), "c.weight": torch.eye(2)}
    report = analyze_weights(tensors)
    assert report.non_finite == ("a.weight", "b.bias")
    assert math.isnan(report.matrices[0].norm)
    assert "NaN or infinity in a.weight, b.bias" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_floating_point_type(dtype):
    found = matrix("w.weight", {"w.weight": (2 * torch.eye(4)).to(dtype)})
    assert found.largest_singular_value == 2
    assert found.dtype == str(dtype).removeprefix("torch.")


def test_it_says_that_it_is_the_weaker_statement_and_becomes_json(tmp_path):
    report = analyze_weights(nn.LSTM(2, 3).state_dict(), name="run.pt")
    assert "weaker statement" in str(report)
    data = json.loads(report.save(tmp_path / "w.json").read_text())
    assert data["schema"] == "stabkit.weights/1"
    assert "no verdict" in data["label"]
    assert len(data["matrices"][0]["eigenvalues"]) == 4


def test_an_activation_that_is_unknown():
    with pytest.raises(ValueError, match="activation='rleu'; accepted: "):
        analyze_weights({}, activation="rleu")


def test_zeros_and_nothing():
    found = matrix("w.weight", {"w.weight": torch.zeros(3, 3)})
    assert found.stable_rank == 0
    assert found.linear_growth == -math.inf
    assert analyze_weights({}).matrices == ()
    assert "0 matrices" in str(analyze_weights({}))
