"""One family of the transformers library: its class, a tiny random configuration, its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .zoo import Built, Subject

VOCABULARY = 100
LAYERS = 4

FAST: dict[str, Any] = {"fast": True}
SINGLE: dict[str, Any] = {"dtype": None, "tolerance": 1e-5}

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


# ---------------------------------------------------------------- inputs


def tokens(length: int = 8) -> dict[str, Tensor]:
    """Random token ids, without the special ones."""
    return {"input_ids": torch.randint(3, VOCABULARY, (2, length))}


def pair() -> dict[str, Tensor]:
    """Token ids for an encoder and a decoder."""
    return tokens(8) | {"decoder_input_ids": tokens(6)["input_ids"]}


def pixels(size: int = 32) -> dict[str, Tensor]:
    """Images of normal noise."""
    return {"pixel_values": torch.randn(2, 3, size, size)}


def wave() -> dict[str, Tensor]:
    """Sounds of normal noise."""
    return {"input_values": torch.randn(2, 800)}


# ---------------------------------------------------------------- subjects


@dataclass(frozen=True)
class Family:
    """One row of the list below.

    Attributes:
        name: family, and what is special about the subject.
        model: name of the model class; its configuration class is the library's own.
        config: what makes it tiny.
        blocks: class names of its blocks, a regular expression.
        steps: how many of them lie between the source and the output.
        inputs: makes the keyword arguments.
        attention: implementation of attention; ``"eager"`` or ``"sdpa"`` (fused).
        experts: implementation of mixtures of experts; ``"grouped_mm"`` (fused) knows no float64.
        prepare: what is done to the model before the call, such as ``nn.Module.train``.
        extra: further fields of `Subject`.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    blocks: str
    steps: int | None = LAYERS
    inputs: Callable[[], dict[str, Any]] = tokens
    attention: str = "eager"
    experts: str = "eager"
    prepare: Callable[[nn.Module], Any] = nn.Module.eval
    extra: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Built:
        """The model, in eval mode unless `prepare` says otherwise, and its inputs."""
        import transformers

        transformers.logging.set_verbosity_error()  # the tiny vocabulary lacks the special tokens
        model_class = getattr(transformers, self.model)
        config = model_class.config_class(**self.config)
        if hasattr(config, "use_cache"):
            config.use_cache = self.config.get("use_cache", False)
        config._attn_implementation = self.attention
        config._experts_implementation = self.experts
        model: nn.Module = model_class(config)
        self.prepare(model)
        return model, (), self.inputs()

    def subject(self) -> Subject:
        """The row as a subject of the zoo."""
        return Subject(self.name, self.build, steps=self.steps, blocks=self.blocks, family="transformers", **self.extra)


def checkpointed(model: nn.Module) -> None:
    """Train mode, with the activations of every layer recomputed in the backward pass."""
    model.train()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
