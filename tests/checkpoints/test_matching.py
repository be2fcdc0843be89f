from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from stabkit.checkpoints.matching import fill, match_names, misfit, non_finite
from stabkit.errors import CheckpointError

WRAPPERS = ["module.", "_orig_mod.", "model.", "net.", "_fsdp_wrapped_module."]


@settings(max_examples=60, deadline=None)
@given(prefixes=st.lists(st.sampled_from(WRAPPERS), max_size=4), ours=st.lists(st.sampled_from(WRAPPERS), max_size=2))
def test_prefixes_in_any_order_on_either_side(prefixes, ours):
    names = ["a.weight", "a.bias", "b.0.weight"]
    match = match_names(["".join(prefixes) + n for n in names], ["".join(ours) + n for n in names])
    assert match.exact
    assert match.renamed == {"".join(prefixes) + n: "".join(ours) + n for n in names}


def test_wrappers_inside_a_name_are_dropped():
    match = match_names(["encoder._orig_mod.w", "decoder.module.w"], ["encoder.w", "decoder.w"])
    assert match.renamed == {"encoder._orig_mod.w": "encoder.w", "decoder.module.w": "decoder.w"}


def test_a_module_that_is_really_called_module_keeps_its_name():
    names = ["module.w", "other.w"]
    match = match_names(names, names)
    assert match.exact
    assert match.how == ""


def test_a_prefix_goes_from_all_names_or_from_none():
    match = match_names(["model.w", "model.b", "loss.w"], ["w", "b"])
    assert not match.exact
    assert match.unexpected == ("model.w", "model.b", "loss.w")


def test_wrapped_twice_by_torch_itself(network, state):
    wrapped = nn.DataParallel(torch.compile(network()))
    wrapped.load_state_dict({"module._orig_mod." + k: v for k, v in state.items()})
    model = network()
    filled = fill(model, wrapped.state_dict())
    assert "stripped" in " ".join(filled.notes)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_parameters_keep_their_identity_and_the_file_its_memory(network, state):
    model = network()
    before, flags = dict(model.named_parameters()), {"0.weight": False}
    model[0].weight.requires_grad_(False)
    fill(model, state)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(p.requires_grad == flags.get(name, True) for name, p in after.items())
    assert all(model.state_dict()[k].data_ptr() == v.data_ptr() for k, v in state.items())


def test_recurrent_weights_reach_the_kernel():
    source, model = nn.LSTM(3, 4, batch_first=True), nn.LSTM(3, 4, batch_first=True)
    fill(model, source.state_dict())
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x)[0], source(x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("2.weight"), r"1 missing from the file: 2\.weight"),
        (lambda s: s.update({"2.wieght": s.pop("2.weight")}), r"2\.weight \(near 2\.wieght\).*unknown to the model"),
        (lambda s: s.update({"3.weight": s.pop("2.weight")}), r"2\.weight.*Give the architecture"),
        (
            lambda s: s.update({f"net.{k}": s.pop(k) for k in list(s)}, loss=torch.ones(2)),
            r"take that part of the file \(--key net\)",
        ),
        (lambda s: s.update({"0.bias": torch.zeros(5)}), r"^1 tensors have.*0\.bias: 5 in the file, 4 in the model"),
        (
            lambda s: s.update({"2.weight": torch.zeros(7, 4), "2.bias": torch.zeros(7)}),
            r"2 tensors.*timm and torchvision take '\{\"num_classes\": 7\}'",
        ),
        (
            lambda s: s.update({"0.bias": torch.zeros(5), "rnn.bias": s.pop("2.bias")}),
            r"2\.bias.*1 unknown to the model: rnn\.bias.*Beside that, 1 tensors.*0\.bias: 5 in the file",
        ),
        (lambda s: s.update({"0.bias": torch.zeros(4, device="meta")}), "without its data"),
        (lambda s: s.update({"0.bias": torch.zeros(4, dtype=torch.int8)}), "quantised"),
        (lambda s: s.update({"0.weight": torch.eye(4)[:, :3].to_sparse()}), "dense"),
    ],
)
def test_a_misfit_is_listed_and_leaves_the_model_as_it_was(network, state, change, message):
    model = network()
    before = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        fill(model, state)
    after = model.state_dict(keep_vars=True)
    assert all(after[k] is old and torch.equal(old, copy) for k, (old, copy) in before.items())


def test_a_renamed_part_is_near_by_the_end_of_its_name():
    text = misfit(["blocks.0.f.bias"], ["layers.0.f.bias", "layers.1.g.bias"])
    assert "blocks.0.f.bias (near layers.0.f.bias)" in text
    assert "layers.1.g.bias (near" not in text


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)


def test_ties_hold_and_recomputed_buffers_are_left_out():
    model, weight = Tied(), torch.arange(15.0).reshape(5, 3)
    filled = fill(model, {"embed.weight": weight, "mask": torch.zeros(2)})
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, weight)
    assert torch.equal(model.mask, torch.ones(2))
    assert any("tied" in note and "head.weight" in note for note in filled.notes)
    assert any("mask" in note for note in filled.notes)


def test_a_tie_that_the_file_breaks_is_an_error():
    with pytest.raises(CheckpointError, match="one parameter in the model, but differ"):
        fill(Tied(), {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)})


def test_memory_shared_in_the_file_only_is_parted():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    shared = torch.eye(2)
    fill(model, {"0.weight": shared, "1.weight": shared})
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(model[1].weight, torch.eye(2))


def test_half_precision_is_cast_to_the_dtype_of_the_model(network, state):
    model = network().double()
    filled = fill(model, {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight, state["0.weight"].half().double())
    assert any("float16" in note and "float64" in note for note in filled.notes)


def test_old_layouts_are_upgraded_by_the_hooks_of_the_model():
    source = nn.Linear(3, 2)
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    model = nn.utils.parametrizations.weight_norm(source)
    fill(model, old.state_dict())
    assert torch.allclose(model.weight, old.weight)


def test_batch_norm_of_before_its_counter(network, state):
    state.pop("1.num_batches_tracked")
    model = network()
    fill(model, state)
    assert torch.equal(model[1].running_var, state["1.running_var"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn])
def test_non_finite_tensors_are_named(dtype):
    model = nn.Module()
    model.good, model.bad = (nn.Parameter(torch.ones(9).to(dtype), requires_grad=False) for _ in range(2))
    values = torch.ones(9)
    values[4] = float("nan")
    model.bad.data = values.to(dtype)
    model.register_buffer("count", torch.tensor(3))
    assert non_finite(model) == ("bad",)
