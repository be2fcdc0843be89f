"""Small models whose numbers are pinned by `tests.pin`, each with the call that makes its flow.

They stand here whole, and not in `tests.models`, so that the pinned numbers depend on nothing but the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from tests.pin_subjects import (
    F32,
    F64,
    Loop,
    Residual,
    Subject,
    classes,
    mean_square,
    pinned,
    plain,
    tanh_fields,
    traced,
)
from tests.pin_subjects import MODELS as MODELS

# ---------------------------------------------------------------- plain and residual networks


@pinned
def mlp_tanh() -> Subject:
    return traced(plain(6, 8), torch.randn(4, 8))


@pinned
def mlp_relu_f32() -> Subject:
    return traced(plain(6, 8, nn.ReLU), torch.randn(4, 8), dtype=F32)


@pinned
def mlp_gelu_head() -> Subject:
    return traced(nn.Sequential(nn.Linear(5, 8), *plain(4, 8, nn.GELU), nn.Linear(8, 3)), torch.randn(4, 5),
                  loss=classes(3))  # fmt: skip


@pinned
def mlp_vanishing() -> Subject:
    return traced(plain(12, 6, gain=0.4), torch.randn(4, 6))


@pinned
def mlp_exploding() -> Subject:
    return traced(plain(12, 6, nn.Identity, gain=2.5), torch.randn(4, 6), loss=mean_square)


@pinned
def mlp_dead_relu() -> Subject:
    net = plain(6, 8, nn.ReLU)
    with torch.no_grad():
        net[4].bias.fill_(-10.0)
    return traced(net, torch.randn(4, 8))


@pinned
def mlp_deep_f32() -> Subject:
    return traced(plain(20, 16, gain=1.1), torch.randn(4, 16), dtype=F32, loss=mean_square)


@pinned
def mlp_with_a_bad_layer() -> Subject:
    net = plain(8, 8)
    with torch.no_grad():
        net[8].weight.mul_(30.0)
    return traced(net, torch.randn(6, 8))


@pinned
def mlp_not_finite() -> Subject:
    net = plain(4, 6)
    with torch.no_grad():
        net[4].weight[0, 0] = float("nan")
    return traced(net, torch.randn(3, 6))


@pinned
def mlp_dropout_training() -> Subject:
    parts: list[nn.Module] = []
    for _ in range(4):
        parts += [nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2)]
    return traced(nn.Sequential(*parts), torch.randn(4, 8), train=True, loss=mean_square)


@pinned
def residual() -> Subject:
    blocks = [Residual(8) for _ in range(6)]
    return traced(nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3)), torch.randn(4, 5), loss=classes(3))


@pinned
def residual_f32() -> Subject:
    blocks = [Residual(8) for _ in range(6)]
    return traced(nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3)), torch.randn(4, 5), dtype=F32,
                  loss=classes(3))  # fmt: skip


@pinned
def residual_stiff() -> Subject:
    return traced(nn.Sequential(*(Residual(6, 0.5, 3.0) for _ in range(6))), torch.randn(4, 6))


@pinned
def highway() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for gate, f in zip(fields[::2], fields[1::2], strict=True):
            t = torch.sigmoid(gate(x) - 1)
            x = t * torch.tanh(f(x)) + (1 - t) * x
        return x

    return traced(Loop(loop, *(nn.Linear(6, 6) for _ in range(8))), torch.randn(3, 6))


@pinned
def gated() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for gate, f in zip(fields[::2], fields[1::2], strict=True):
            x = x + torch.sigmoid(gate(x)) * f(x)
        return x

    return traced(Loop(loop, *(nn.Linear(6, 6) for _ in range(8))), torch.randn(3, 6))


@pinned
def layer_scale() -> Subject:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.f, self.gamma = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.f(self.norm(x))

    return traced(nn.Sequential(*(Block() for _ in range(5))), torch.randn(3, 8))


@pinned
def densely_connected() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for f in fields:
            x = torch.cat([x, f(x.relu())], dim=1)
        return x

    return traced(Loop(loop, *(nn.Linear(4 + 2 * i, 2) for i in range(5))), torch.randn(3, 4))


# ---------------------------------------------------------------- convolutions


class ConvBlock(nn.Module):
    def __init__(self, channels: int, skip: bool = True) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.m, self.n = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.b(self.m(self.a(x)).relu()))
        return (x + y).relu() if self.skip else y.relu()


def convolutional(skip: bool) -> nn.Sequential:
    blocks = [ConvBlock(3, skip) for _ in range(4)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *blocks, head)


@pinned
def conv_resnet() -> Subject:
    return traced(convolutional(True), torch.randn(3, 2, 4, 4), loss=classes(4))


@pinned
def conv_resnet_f32() -> Subject:
    return traced(convolutional(True), torch.randn(3, 2, 4, 4), dtype=F32, loss=classes(4))


@pinned
def conv_plain() -> Subject:
    return traced(convolutional(False), torch.randn(3, 2, 4, 4))


@pinned
def unet() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        a = fields[0](x).relu()
        b = fields[1](functional.max_pool2d(a, 2)).relu()
        c = fields[2](functional.max_pool2d(b, 2)).relu()
        b = fields[3](torch.cat([functional.interpolate(c, scale_factor=2, mode="bilinear"), b], 1)).tanh()
        return fields[4](torch.cat([functional.interpolate(b, scale_factor=2, mode="bilinear"), a], 1)).tanh()

    sizes = [(1, 2), (2, 3), (3, 4), (7, 3), (5, 1)]
    return traced(Loop(loop, *(nn.Conv2d(m, n, 3, padding=1) for m, n in sizes)), torch.randn(2, 1, 8, 8))


@pinned
def resnet18_f32() -> Subject:
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return traced(model, torch.randn(2, 3, 32, 32), dtype=F32, loss=classes(10), large=True)


# ---------------------------------------------------------------- transformers


def vision_transformer() -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=2, num_classes=3, embed_dim=8, depth=3, num_heads=2
    )


@pinned
def vit_tiny() -> Subject:
    return traced(vision_transformer(), torch.randn(2, 2, 8, 8), loss=classes(3))


@pinned
def vit_tiny_f32() -> Subject:
    return traced(vision_transformer(), torch.randn(2, 2, 8, 8), dtype=F32, loss=classes(3))


def gpt2(dtype: torch.dtype) -> Subject:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_embd=8, n_layer=3, n_head=2, n_positions=16, vocab_size=11, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.arange(6).view(1, 6)
    kwargs = {"input_ids": tokens, "use_cache": False}
    return traced(transformers.GPT2LMHeadModel(config), dtype=dtype, kwargs=kwargs, loss=classes(11))


@pinned
def gpt2_tiny() -> Subject:
    return gpt2(F64)


@pinned
def gpt2_tiny_f32() -> Subject:
    return gpt2(F32)


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


@pinned
def encoder_pre_norm() -> Subject:
    return traced(encoder(True), torch.randn(2, 4, 8), loss=mean_square)


@pinned
def encoder_pre_norm_f32() -> Subject:
    return traced(encoder(True), torch.randn(2, 4, 8), dtype=F32)


@pinned
def encoder_post_norm() -> Subject:
    return traced(encoder(False), torch.randn(2, 4, 8))


# ---------------------------------------------------------------- integrators written as networks


@pinned
def momentum() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in fields:
            v = 0.9 * v + 0.1 * f(x)
            x = x + v
        return x

    return traced(Loop(loop, *tanh_fields()), torch.randn(2, 6))


@pinned
def leapfrog() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        before, now = x, x + 0.1 * fields[0](x)
        for f in fields[1:]:
            before, now = now, 2 * now - before + 0.04 * f(now)
        return now

    return traced(Loop(loop, *tanh_fields()), torch.randn(2, 6))


@pinned
def two_step_midpoint() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        before, now = x, x + 0.1 * fields[0](x)
        for f in fields[1:]:
            before, now = now, before + 0.2 * f(now)
        return now

    return traced(Loop(loop, *tanh_fields()), torch.randn(2, 6))


@pinned
def rk4() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for f in fields:
            a = f(x)
            b = f(x + 0.15 * a)
            c = f(x + 0.15 * b)
            d = f(x + 0.3 * c)
            x = x + 0.05 * (a + 2 * b + 2 * c + d)
        return x

    return traced(Loop(loop, *tanh_fields(3, 4)), torch.randn(2, 4))


@pinned
def heun() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for f in fields:
            a = f(x)
            x = x + 0.15 * (a + f(x + 0.3 * a))
        return x

    return traced(Loop(loop, *tanh_fields(4, 4)), torch.randn(2, 4))


@pinned
def strang() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for f, g in zip(fields[::2], fields[1::2], strict=True):
            x = x + 0.1 * f(x)
            x = x + 0.2 * g(x)
            x = x + 0.1 * f(x)
        return x

    return traced(Loop(loop, *tanh_fields(6, 4)), torch.randn(2, 4))


@pinned
def coupling() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for f, g in zip(fields[::2], fields[1::2], strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], dim=1)

    return traced(Loop(loop, *tanh_fields(8, 3)), torch.randn(3, 6))


@pinned
def antisymmetric() -> Subject:
    def loop(fields: Any, x: Tensor) -> Tensor:
        for f in fields:
            W = f.weight - f.weight.T - 0.1 * torch.eye(6, dtype=x.dtype)
            x = x + 0.3 * torch.tanh(x @ W.T)
        return x

    return traced(Loop(loop, *(nn.Linear(6, 6, bias=False) for _ in range(5))), torch.randn(3, 6))


# ---------------------------------------------------------------- recurrence and iterated maps


def recurrent(module: nn.Module, x: Tensor, dtype: torch.dtype = F64) -> Subject:
    module = module.to(dtype)
    return Subject(lambda: stabkit.recurrent_flow(module, x.to(dtype)), dtype)


@pinned
def lstm() -> Subject:
    return recurrent(nn.LSTM(3, 4), torch.randn(12, 2, 3))


@pinned
def lstm_two_layers_f32() -> Subject:
    return recurrent(nn.LSTM(3, 4, num_layers=2), torch.randn(12, 2, 3), F32)


@pinned
def gru() -> Subject:
    return recurrent(nn.GRU(3, 5), torch.randn(12, 2, 3))


@pinned
def rnn() -> Subject:
    return recurrent(nn.RNN(3, 5), torch.randn(12, 2, 3))


@pinned
def gru_cell_in_a_loop() -> Subject:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 5)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.head(h)

    module, x = Reader().double(), torch.randn(2, 8, 3, dtype=F64)
    return Subject(lambda: stabkit.recurrent_flow(module, x), call=(module, (x,), {}), loss=mean_square)


@pinned
def henon() -> Subject:
    def step(x: Tensor) -> Tensor:
        return torch.stack([1 - 1.4 * x[:, 0] ** 2 + x[:, 1], 0.3 * x[:, 0]], 1)

    return Subject(lambda: stabkit.iterate(step, torch.tensor([[0.1, 0.1], [0.2, 0.0]], dtype=F64), 60))


@pinned
def logistic() -> Subject:
    return Subject(lambda: stabkit.iterate(lambda x: 3.9 * x * (1 - x), torch.tensor([[0.3]], dtype=F64), 50))


@pinned
def lorenz() -> Subject:
    def slope(u: Tensor) -> Tensor:
        x, y, z = u.unbind(1)
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)

    def step(u: Tensor) -> Tensor:
        a = slope(u)
        b = slope(u + 0.005 * a)
        c = slope(u + 0.005 * b)
        return u + 0.01 / 6 * (a + 2 * b + 2 * c + slope(u + 0.01 * c))

    return Subject(lambda: stabkit.iterate(step, torch.tensor([[1.0, 2.0, 20.0]], dtype=F64), 100, step_size=0.01))


@pinned
def tied_depth() -> Subject:
    block = Residual(5).double()
    x = torch.randn(3, 5, dtype=F64)
    return Subject(lambda: stabkit.iterate(block, x, 12))
