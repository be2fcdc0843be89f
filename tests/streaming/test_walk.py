from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stabkit
from stabkit.errors import CheckpointError, StabkitError, TraceError
from stabkit.streaming import analyze_files
from tests.streaming.models import Looped, Tower, saved, tokens, tower

ROOT = Path(__file__).parent.parent.parent


class Blocks(nn.Module):
    """The blocks of a tower alone, to be traced whole."""

    def __init__(self, model: Tower) -> None:
        super().__init__()
        self.blocks = model.blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def traced(model: Tower) -> stabkit.Flow:
    x = model.embedding(tokens()).detach()
    return stabkit.trace(Blocks(model), x, depth=[f"blocks.{i}" for i in range(len(model.blocks))])


def test_what_is_streamed_is_what_the_whole_model_gives(tmp_path):
    model = tower()
    found = analyze_files(saved(tmp_path, model), tokens(), model=Tower, probes=3, k=2, max_products=200, tol=1e-5)
    flow = traced(model)
    profile = stabkit.gradient_profile(flow, probes=3)
    torch.testing.assert_close(found.all_log_growth, profile.all_log_growth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradient_norms, profile.gradient_norms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.state_norms, profile.state_norms, rtol=1e-5, atol=1e-5)
    for step, values in zip(flow.steps, found.singular_values, strict=True):
        exact = torch.linalg.svdvals(step.jacobian().dense().double())[:, :2]
        torch.testing.assert_close(values, exact, rtol=1e-4, atol=1e-5)
    assert bool(found.converged.all())
    assert found.names == tuple(f"blocks.{i}" for i in range(5))
    assert json.loads(json.dumps(found.to_dict()))["reused"] == 0


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path):
    folder, out = saved(tmp_path / "weights", tower()), tmp_path / "out"
    whole = analyze_files(folder, tokens(), model=Tower, probes=2)
    command = [sys.executable, "-m", "tests.streaming.models", str(folder), str(out)]
    for count, code in ((3, -9), (8, -9)):
        killed = subprocess.run([*command, str(count)], cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == code, killed.stderr
    found = analyze_files(folder, tokens(), model=Tower, probes=2, out=out)
    assert found.reused == 8  # five states and three blocks on the way back
    for name in ("all_log_growth", "gradient_norms", "state_norms", "singular_values"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    again = analyze_files(folder, tokens(), model=Tower, probes=2, out=out)
    assert again.reused == 10
    assert torch.equal(again.all_log_growth, found.all_log_growth)


def test_results_are_found_by_content(tmp_path):
    model, out = tower(), tmp_path / "out"
    analyze_files(saved(tmp_path / "a", model), tokens(), model=Tower, out=out, k=0)
    moved = analyze_files(saved(tmp_path / "b", model), tokens(), model=Tower, out=out, k=0)
    assert moved.reused == 10
    with torch.no_grad():
        model.blocks[2].outer.weight.mul_(1.5)
    changed = analyze_files(saved(tmp_path / "b", model), tokens(), model=Tower, out=out, k=0)
    assert changed.reused == 2  # the states before the block that changed
    assert analyze_files(tmp_path / "b", tokens(), model=Tower, out=out, k=0, seed=1).reused == 5


def test_half_a_file_is_computed_again(tmp_path):
    folder, out = saved(tmp_path / "weights", tower()), tmp_path / "out"
    whole = analyze_files(folder, tokens(), model=Tower, out=out)
    for path in out.glob("block-0002-*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    again = analyze_files(folder, tokens(), model=Tower, out=out)
    assert again.reused == 9
    torch.testing.assert_close(again.all_log_growth, whole.all_log_growth)


def test_growth_beyond_the_range_of_a_float_is_measured(tmp_path):
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(40)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    steep = Steep()
    for block in steep.blocks:
        block.weight.data = 1e-3 * torch.eye(3)
    found = analyze_files(saved(tmp_path, steep), torch.ones(1, 3), model=Steep, k=0)
    exact = torch.full((40, 1), -6.907755, dtype=torch.float64)
    torch.testing.assert_close(found.log_growth, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_hugging_face_directory_is_streamed_in_bf16(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=32, **sizes)
        model, blocks = transformers.GPT2LMHeadModel(config), "transformer.h"
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, **sizes
        )
        model, blocks = transformers.LlamaForCausalLM(config), "model.layers"
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    words = torch.randint(64, (2, 5))
    found = analyze_files(tmp_path, words, probes=2, k=0)
    model.set_attn_implementation("eager")
    model = model.float()
    stack = model.get_submodule(blocks)
    flow = stabkit.trace(
        model, words, kwargs={"use_cache": False}, depth=[f"{blocks}.{i}" for i in range(3)], target=None
    )
    states = [step.source for step in flow.steps if step.module_path.startswith(f"{blocks}.")]
    norms = torch.stack([torch.linalg.vector_norm(state.flatten().double(), dim=1) for state in states])
    torch.testing.assert_close(found.state_norms[:3], norms, rtol=1e-4, atol=1e-4)
    assert found.names == tuple(f"{blocks}.{i}" for i in range(len(stack)))
    assert bool(found.log_growth.isfinite().all())
    first = next(step for step in flow.steps if step.module_path == f"{blocks}.1").jacobian()
    assert first.shape[1:] == (5 * 32, 5 * 32)


def test_blocks_that_are_no_chain_are_refused(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(TraceError, match="does not begin with what the block before it returned"):
        analyze_files(saved(tmp_path, Looped()), tokens(), model=Looped)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tensor 'blocks\.5\.norm\.weight'"):
        analyze_files(saved(tmp_path / "few", tower()), tokens(), model=lambda: Tower(depth=6))
    with pytest.raises(CheckpointError, match="has shape"):
        analyze_files(saved(tmp_path / "other", tower()), tokens(), model=lambda: Tower(width=8))


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(TraceError, match="no input"):
        analyze_files(tmp_path)
    with pytest.raises(StabkitError, match="probes=0"):
        analyze_files(tmp_path, tokens(), probes=0)
    with pytest.raises(CheckpointError, match="no weights"):
        analyze_files(tmp_path, tokens())
