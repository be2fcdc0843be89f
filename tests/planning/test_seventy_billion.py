from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import stabkit
from stabkit.planning import sizes
from tests.planning.seventy_billion import H100, LLAMA_70B, Transformer, page, profile_price

TOKENS = 24
SMALL = Transformer(layers=2, width=32, heads=4, kv_heads=2, inner=48, vocabulary=40)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=SMALL.layers,
        hidden_size=SMALL.width,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        intermediate_size=SMALL.inner,
        vocab_size=SMALL.vocabulary,
        use_cache=False,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaModel(config).eval()


class Counter(TorchDispatchMode):
    """Operations by torch's own formulas; its own counter puts hooks on modules, which a recorded step refuses."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def test_operations_are_those_that_torch_counts():
    model, words = llama(), torch.randint(SMALL.vocabulary, (1, TOKENS))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(words)
    assert forward.get_total_flops() == SMALL.forward_flops(TOKENS)
    flow = stabkit.trace(model, words)
    cotangents = flow.cotangent()
    with FlopCounterMode(display=False) as product:
        for step in reversed(flow.steps):
            cotangents = step.vjp(cotangents)
    assert product.get_total_flops() == SMALL.product_flops(TOKENS)


def test_parameters_are_those_of_the_model():
    norms = (2 * SMALL.layers + 1) * SMALL.width
    assert sum(p.numel() for p in llama().parameters()) == SMALL.parameters - SMALL.vocabulary * SMALL.width + norms
    assert LLAMA_70B.parameters == pytest.approx(70.55e9, rel=1e-3)  # as published


def test_probes_are_shared_out_but_the_forward_pass_is_not():
    one = profile_price(SMALL, H100, tokens=TOKENS, probes=8, devices=1)
    eight = profile_price(SMALL, H100, tokens=TOKENS, probes=8, devices=8)
    assert one.flops == 2 * SMALL.forward_flops(TOKENS) + 15 * SMALL.product_flops(TOKENS)
    assert eight.flops == 2 * SMALL.forward_flops(TOKENS) + 8 * SMALL.product_flops(TOKENS)
    assert eight.read_bytes == one.read_bytes
    assert eight.cotangents == one.cotangents / 8


def test_a_streamed_walk_takes_the_operations_that_the_formula_counts(tmp_path):
    from stabkit.streaming import analyze_files

    model, words = llama(), torch.randint(SMALL.vocabulary, (1, TOKENS))
    model.save_pretrained(tmp_path)
    with Counter() as counter:
        analyze_files(tmp_path, words, probes=8, k=0)
    price = profile_price(SMALL, H100, tokens=TOKENS, probes=8, devices=1)
    assert counter.operations == pytest.approx(price.flops, rel=0.01)


def test_the_page_says_what_the_formulas_give():
    price = profile_price(LLAMA_70B, H100, tokens=4096, probes=8, devices=8)
    text = page()
    for number, unit in ((price.flops, "FLOP"), (price.memory, "B"), (price.read_bytes, "B"), (price.host, "B")):
        assert sizes.amount(number, unit) in text
    assert f"**{sizes.duration(price.seconds)}**" in text
    assert price.memory < H100.memory
    assert (Path(__file__).parents[2] / "examples" / "seventy_billion_parameters.md").read_text() == text


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="devices=0"):
        profile_price(SMALL, H100, tokens=1, probes=1, devices=0)
