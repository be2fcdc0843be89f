"""Models of torchvision, timm, transformers and torch, with what should be read off their blocks.

``python -m tests.identification.real_models`` prints what was read and why.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

from .recurrent_models import over_time


@dataclass(frozen=True)
class RealModel:
    """A model of a library.

    Attributes:
        name: of the model.
        build: the model, its inputs, and keyword arguments of `trace`.
        expected: how many records of which name.
    """

    name: str
    build: Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]
    expected: dict[str, int]


def image(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def torchvision_model(name: str, **options: Any) -> Any:
    def build() -> Any:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None, **options).eval()
        return model, (image(options.get("image_size", 32)),), {}

    return build


def timm_model(name: str, **options: Any) -> Any:
    def build() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm

            return timm.create_model(name, pretrained=False, **options).eval(), (image(),), {}

    return build


def transformer(name: str, **options: Any) -> Any:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}Model")(config).eval()
        return model, (torch.randint(0, 90, (2, 7)),), {"target": "last_hidden_state"}

    return build


def with_layer_scale() -> Any:
    """LayerScale starts at 1e-6; here each channel gets a size of its own."""
    model, inputs, options = torchvision_model("convnext_tiny")()
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.uniform_(parameter, 0.1, 0.3)
    return model, inputs, options


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GPTJ = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 32}
VIT = {"image_size": 64, "patch_size": 16, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
LIE = "Lie splitting (2 Euler steps)"
POST = "projected Euler (post-norm)"
MODELS = (
    RealModel("torchvision resnet18", torchvision_model("resnet18"), {"projected Euler (ReLU)": 5}),
    RealModel("torchvision resnet50 (v1)", torchvision_model("resnet50"), {"projected Euler (ReLU)": 12}),
    RealModel("timm resnetv2_50 (pre-act)", timm_model("resnetv2_50"), {"forward Euler": 12}),
    RealModel("torchvision convnext_tiny", with_layer_scale, {"forward Euler": 18}),
    RealModel("timm vit_tiny (pre-LN)", timm_model("vit_tiny_patch16_224", img_size=32, depth=4), {LIE: 4}),
    RealModel("BERT (post-LN)", transformer("Bert", **SMALL), {POST: 3}),
    RealModel("GPT-J (parallel)", transformer("GPTJ", **GPTJ), {"forward Euler, parallel branches": 3}),
    RealModel("GPT-2 (pre-LN)", transformer("GPT2", vocab_size=99, n_embd=32, n_layer=3, n_head=4), {LIE: 3}),
    RealModel("Llama (RMSNorm, SwiGLU)", transformer("Llama", **SMALL, num_key_value_heads=2), {LIE: 3}),
    RealModel("torch GRUCell over time", lambda: over_time(lambda: nn.GRUCell(3, 5)), {"gated Euler": 6}),
    RealModel("torch LSTMCell over time", lambda: over_time(lambda: nn.LSTMCell(3, 5), 2),
              {"gated memory cell (LSTM)": 6}),
)  # fmt: skip


def read(model: RealModel) -> tuple[Identification, ...]:
    """What is read off a model."""
    torch.manual_seed(0)
    module, inputs, options = model.build()
    return identify(trace(module, *inputs, **options))


def count(records: tuple[Identification, ...]) -> Counter[str]:
    """How many records of which name; gates by kind, since their means differ."""
    return Counter(r.name.split(" (mean")[0] for r in records)


def main() -> int:
    """Print what was read; 1 when something else was expected."""
    wrong = 0
    for model in MODELS:
        records = read(model)
        found = count(records)
        right = all(found[name] == number for name, number in model.expected.items())
        wrong += not right
        print(f"{model.name}: {'' if right else f'WRONG, expected {model.expected}: '}")
        for name, number in found.most_common():
            first = next(r for r in records if r.name.startswith(name))
            residual = "" if first.residual is None else f", residual {first.residual:.0e}"
            print(
                f"    {number:3d} x {name} [{first.evidence}{residual}]: {'; '.join(first.notes) or first.convention}"
            )
            for check in first.checks:
                print(f"          {check.name} = {check.value:.2g}: {check.meaning}")
    print(f"{len(MODELS) - wrong} of {len(MODELS)} as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
