from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.checkpoints.state_dict import architecture_hint, arrange, choose_weights, find_weights
from stabkit.errors import CheckpointError


def chosen(saved, model=None, **options):
    return choose_weights(find_weights(saved), model, **options)[0]


@pytest.mark.parametrize("path", [(), ("model",), ("state_dict",), ("ckpt", "net"), ("a", "b", "c")])
def test_the_weights_are_found_at_any_depth(network, state, path):
    optimizer = torch.optim.Adam(network().parameters()).state_dict()
    saved = state
    for name in reversed(path):
        saved = {name: saved, "optimizer": optimizer, "epoch": 3}
    found = chosen(saved)
    assert found.path == path
    assert found.tensors.keys() == state.keys()


def test_the_set_that_fits_the_model_is_taken(network, state):
    other = nn.Linear(7, 7).state_dict()
    assert chosen({"model": other, "generator": state}, network()).path == ("generator",)


def test_an_optimizer_that_looks_like_weights_is_not(network, state):
    moments = {f"m.{k}": v for k, v in state.items()}
    assert chosen({"optimizer": moments, "weights_of_student": state}).path == ("weights_of_student",)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "ema_model", "swa_state_dict"])
def test_raw_or_averaged(state, name):
    average = {k: v * 0 for k, v in state.items()}
    saved = {"model": state, name: {"decay": 0.999, "module": average}}
    assert chosen(saved).path == ("model",)
    assert chosen(saved, weights="ema").path == (name, "module")


def test_averaged_weights_of_torch_itself(network, state):
    averaged = torch.optim.swa_utils.AveragedModel(network()).state_dict()
    found = chosen({"model": state, "average": averaged}, weights="ema")
    assert found.path == ("average",)
    assert chosen({"average": averaged}).averaged  # the only ones: taken, and said


def test_averaged_weights_beside_the_raw_ones_in_one_dictionary(network, state):
    flat = {**{f"model.{k}": v for k, v in state.items()}, **{f"ema.{k}": v for k, v in state.items()}}
    assert set(chosen(flat, network()).tensors) == {f"model.{k}" for k in state}
    assert set(chosen(flat, network(), weights="ema").tensors) == {f"ema.{k}" for k in state}


def test_counters_of_averages_are_no_weights(network, state):
    """As ``ema-pytorch`` saves itself, and as a LightningModule with an ``AveragedModel`` inside."""
    average = {k: v * 0 for k, v in state.items()}
    online, averaged = (
        {f"{h}.{k}": v for k, v in s.items()} for h, s in (("online_model", state), ("ema_model", average))
    )
    saved = {"ema": {"initted": torch.tensor(True), "step": torch.tensor(3), **online, **averaged}}
    assert set(chosen(saved, network(), weights="raw").tensors) == set(online)
    assert set(chosen(saved, network(), weights="ema").tensors) == set(averaged)
    module = torch.optim.swa_utils.AveragedModel(network()).state_dict()
    inside = {**{f"model.{k}": v for k, v in state.items()}, **{f"ema_model.{k}": v for k, v in module.items()}}
    assert set(chosen({"state_dict": inside}, network()).tensors) == {f"model.{k}" for k in state}
    taken = chosen({"state_dict": inside}, network(), weights="ema")
    assert set(taken.tensors) == {f"ema_model.module.{k}" for k in state}
    assert taken.ignored == ("ema_model.n_averaged",)


def test_shadow_parameters_come_in_the_order_of_the_model(network, state):
    model = network()
    shadow = [torch.full_like(p, i) for i, p in enumerate(model.parameters())]
    found = find_weights({"model": state, "ema": {"decay": 0.9, "shadow_params": shadow}})
    taken = choose_weights(found, model, weights="ema")[0]
    arranged = arrange(taken, found, model)
    assert [float(arranged[name].mean()) for name, _ in model.named_parameters()] == list(range(6))
    assert torch.equal(arranged["1.running_mean"], state["1.running_mean"])
    with pytest.raises(CheckpointError, match="lists 6 tensors, but the model has 2"):
        arrange(taken, found, nn.Linear(2, 2))


def test_a_key_leads_to_a_set_or_to_a_prefix_of_names(state):
    lightning = {"state_dict": {**{f"net.{k}": v for k, v in state.items()}, "loss.weight": torch.ones(2)}}
    assert set(chosen(lightning, key="state_dict.net").tensors) == {f"net.{k}" for k in state}
    assert set(chosen(lightning, key="net").tensors) == {f"net.{k}" for k in state}
    with pytest.raises(CheckpointError, match=r"key 'state_dit' leads.*did you mean state_dict"):
        chosen(lightning, key="state_dit")


def test_nothing_to_take(state):
    for empty in ({}, {"epoch": 3}, [state], 7, None):
        with pytest.raises(CheckpointError, match="no tensors with names"):
            chosen(empty)
    with pytest.raises(CheckpointError, match=r"no averaged weights.*'model' \(9 tensors\)"):
        chosen({"model": state}, weights="ema")


def test_entries_that_are_not_tensors_are_said_to_be_ignored(state):
    weights, notes = choose_weights(find_weights({**state, "step": 7}), None)
    assert weights.ignored == ("step",)
    assert any("step" in note for note in notes)


def test_the_architecture_named_in_a_training_dict(state):
    assert "timm:resnet18" in architecture_hint({"arch": "resnet18", "state_dict": state})
    assert "timm:vit" in architecture_hint({"model": state, "args": {"model": "vit"}})
    assert architecture_hint(state) == ""


def test_lightning_weight_averaging_puts_the_average_under_the_usual_name(state):
    average = {name: value + 1 for name, value in state.items()}
    saved = {
        "state_dict": average,
        "current_model_state": state,
        "averaging_state": {"n_averaged": torch.tensor(3)},
        "pytorch-lightning_version": "2.6.0",
    }
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    found = find_weights(saved)
    assert torch.equal(choose_weights(found, model)[0].tensors["0.weight"], state["0.weight"])
    taken, notes = choose_weights(found, model, weights="ema")
    assert torch.equal(taken.tensors["0.weight"], average["0.weight"])
    assert "averaged weights (EMA)" in notes


def test_a_tensor_that_claims_more_than_it_has_is_refused():
    with pytest.raises(CheckpointError, match="w claims 1099511627776 numbers and has 4 bytes"):
        find_weights({"w": torch.ones(1).expand(2**20, 2**20)})
    # a mask that was expanded before it was saved is no attack
    assert find_weights({"mask": torch.ones(1, 1).expand(64, 64)})
