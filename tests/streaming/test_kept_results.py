"""What is kept between runs is told of what it was computed from, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import nn

from stabkit.errors import CheckpointError
from stabkit.streaming import analyze_files
from tests.streaming.models import Tower, saved, tokens, tower

FACTOR = 1.0


class Scaled(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, x):
        return x + FACTOR * self.act(self.linear(x))


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Scaled) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def told(folder, out, model, x=None):
    x = torch.ones(2, 4) if x is None else x
    kept = analyze_files(folder, x, model=model, out=out, k=0)
    anew = analyze_files(folder, x, model=model, k=0)
    assert torch.equal(kept.all_log_growth, anew.all_log_growth)
    assert torch.equal(kept.state_norms, anew.state_norms)
    return kept.reused


def test_another_model_with_the_same_weights_is_computed(tmp_path, monkeypatch):
    folder, out = saved(tmp_path / "a", Stack()), tmp_path / "out"
    assert told(folder, out, Stack) == 0
    assert told(folder, out, lambda: Stack()) == 6
    assert told(folder, out, lambda: Stack(lambda: Scaled(torch.relu))) == 0
    slope = 0.5
    assert told(folder, out, lambda: Stack(lambda: Scaled(lambda x: slope * x))) == 0
    slope = 0.25
    assert told(folder, out, lambda: Stack(lambda: Scaled(lambda x: slope * x))) == 0
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert told(folder, out, Stack) == 0


def test_another_config_is_computed(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words, out = torch.randint(64, (1, 5)), tmp_path / "out"
    assert told(tmp_path, out, None, words) == 0
    assert told(tmp_path, out, None, words) == 4
    turned = {"rope_type": "default", "rope_theta": 50.0}
    for name, value in (("rms_norm_eps", 1e-2), ("rope_parameters", turned), ("hidden_act", "relu")):
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**written, name: value}))
        assert told(tmp_path, out, None, words) == 0, name


def test_what_nothing_tells_apart_is_computed(tmp_path):
    class Drawing(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.source = (float(i) for i in range(9))

    folder, out = saved(tmp_path / "a", Stack()), tmp_path / "out"
    assert told(folder, out, lambda: Stack(Drawing)) == told(folder, out, lambda: Stack(Drawing)) == 0


def test_a_block_that_draws_gives_the_same_numbers_when_some_are_kept(tmp_path):
    class Noisy(Scaled):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn_like(x) * x

    folder, out = saved(tmp_path / "a", Stack()), tmp_path / "out"
    before = torch.get_rng_state()
    assert told(folder, out, lambda: Stack(Noisy)) == 0
    assert torch.equal(before, torch.get_rng_state())
    for path in out.glob("*-0002-*"):
        path.unlink()
    assert told(folder, out, lambda: Stack(Noisy)) == 4


def test_a_file_with_one_wrong_number_or_of_another_key_is_computed_again(tmp_path):
    folder, out = saved(tmp_path / "weights", tower()), tmp_path / "out"
    assert told(folder, out, Tower, tokens()) == 0
    paths = sorted(out.iterdir())
    flipped = bytearray(paths[0].read_bytes())
    flipped[-3] ^= 64
    paths[0].write_bytes(flipped)
    paths[1].write_bytes(paths[2].read_bytes())
    paths[3].write_bytes(safetensors.torch.save({"other": torch.ones(2)}))
    paths[4].write_bytes(safetensors.torch.save(safetensors.torch.load(paths[4].read_bytes())))
    assert told(folder, out, Tower, tokens()) == 6


@pytest.mark.parametrize("claim", [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"intermediate_size": 10**7}])
def test_a_config_out_of_proportion_to_its_weights_is_refused(tmp_path, claim):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **claim}))
    with pytest.raises(CheckpointError, match=r"describes a model of more than|cannot build LlamaForCausalLM"):
        analyze_files(tmp_path, torch.randint(64, (1, 4)), k=0)
