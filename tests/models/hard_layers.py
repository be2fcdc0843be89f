"""Hard cases: every corner of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import hard_dynamics as dynamics
from .building import built, chain, on
from .hard_models import Residual, Wrapped
from .zoo import Subject

_ENCODER = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}


def _encoder(depth: int, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**_ENCODER, **options)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def _packed(lstm: nn.Module, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)[0]


def _unpool(conv: nn.Module, x: Tensor) -> Tensor:
    pooled, where = functional.max_pool2d(conv(x), 2, return_indices=True)
    return functional.max_unpool2d(pooled.sin(), where, 2)


class _Lookup(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.first, self.second = table, Residual(4), Residual(4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.first(self.table(tokens)))


class _Sum(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.layer, self.branches = nn.Linear(4, 4), nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.stack([branch(h) for branch in self.branches]).sum(0)


_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink,
)  # fmt: skip

SUBJECTS = [
    Subject(
        "Transformer",
        built(lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True), on(2, 5, 8), on(2, 4, 8)),
        steps=4,
        blocks="Transformer(En|De)coderLayer",
    ),
    Subject("TransformerEncoder", built(lambda: _encoder(3), on(2, 5, 8)), 3, "TransformerEncoderLayer", fast=True),
    Subject(
        "TransformerEncoder pre-norm, dropout, train",
        built(lambda: _encoder(3, norm_first=True), on(2, 5, 8), train=True),
        steps=3,
        blocks="TransformerEncoderLayer",
    ),
    Subject(
        "TransformerDecoder",
        built(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_ENCODER), 3), on(2, 5, 8), on(2, 4, 8)),
        steps=3,
        blocks="TransformerDecoderLayer",
        options={"source": "0"},
    ),
    Subject(
        "MultiheadAttention, (T, B, D)",
        built(lambda: Wrapped(lambda m, x: m(x, x, x)[0], nn.MultiheadAttention(8, 2)), on(5, 2, 8)),
        options={"batch_dim": 1},
        fast=True,
    ),
    Subject("RNN", built(lambda: nn.RNN(4, 5, 2, nonlinearity="relu"), on(6, 2, 4)), options={"batch_dim": 1}),
    Subject("LSTM, two layers", built(lambda: nn.LSTM(4, 5, 2, batch_first=True), on(2, 6, 4)), fast=True),
    Subject("LSTM, projected", built(lambda: nn.LSTM(4, 5, proj_size=3, batch_first=True), on(2, 6, 4))),
    Subject("GRU, bidirectional", built(lambda: nn.GRU(4, 5, 2, batch_first=True, bidirectional=True), on(2, 6, 4))),
    Subject(
        "GRU with dropout, train",
        built(lambda: nn.GRU(4, 5, 2, batch_first=True, dropout=0.3), on(2, 6, 4), train=True),
    ),
    Subject("LSTM on a packed sequence", built(lambda: Wrapped(_packed, nn.LSTM(4, 5, batch_first=True)), on(2, 5, 4))),
    Subject(
        "LSTMCell loop", built(lambda: dynamics.CellLoop(nn.LSTMCell(4, 5)), on(2, 7, 4)), 7, "LSTMCell", fast=True
    ),
    Subject("GRUCell loop", built(lambda: dynamics.CellLoop(nn.GRUCell(4, 5)), on(2, 7, 4)), 7, "GRUCell"),
    Subject("RNNCell loop", built(lambda: dynamics.CellLoop(nn.RNNCell(4, 5)), on(2, 7, 4)), 7, "RNNCell"),
    Subject("Embedding", built(lambda: _Lookup(nn.Embedding(9, 4)), lambda: torch.randint(9, (2, 5))), 2, "Residual"),
    Subject(
        "EmbeddingBag", built(lambda: _Lookup(nn.EmbeddingBag(9, 4)), lambda: torch.randint(9, (2, 5))), 2, "Residual"
    ),
    Subject(
        "Embedding with max_norm",
        built(lambda: _Lookup(nn.Embedding(9, 4, max_norm=1.0)), lambda: torch.randint(9, (2, 5))),
        2,
        "Residual",
    ),
    Subject(
        "norms",
        built(
            chain(
                lambda: nn.Conv2d(3, 4, 1),
                lambda: nn.BatchNorm2d(4),
                lambda: nn.GroupNorm(2, 4),
                lambda: nn.InstanceNorm2d(4, affine=True),
                lambda: nn.LayerNorm([4, 6, 6]),
                lambda: nn.LocalResponseNorm(2),
                lambda: nn.RMSNorm(6),
            ),
            on(2, 3, 6, 6),
        ),
    ),
    Subject("CrossMapLRN2d", built(chain(lambda: nn.Conv2d(2, 4, 1), lambda: nn.CrossMapLRN2d(2)), on(2, 2, 3, 3))),
    Subject(
        "convolutions",
        built(
            chain(
                lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=2),
                lambda: nn.ConvTranspose1d(8, 4, 4, stride=2),
                lambda: nn.Unflatten(2, (3, 6)),
                lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="reflect"),
                lambda: nn.ConvTranspose2d(4, 2, 2, dilation=2),
                lambda: nn.Unflatten(1, (1, 2)),
                lambda: nn.Conv3d(1, 2, 2),
                lambda: nn.ConvTranspose3d(2, 1, 2),
            ),
            on(2, 4, 16),
        ),
    ),
    Subject(
        "pooling",
        built(
            chain(
                lambda: nn.Conv2d(2, 4, 3),
                lambda: nn.MaxPool2d(2, 1),
                lambda: nn.AvgPool2d(2, 1),
                lambda: nn.LPPool2d(2, 2, 1),
                lambda: nn.AdaptiveMaxPool2d(6),
                lambda: nn.FractionalMaxPool2d(2, output_size=5),
                lambda: nn.AdaptiveAvgPool2d((3, 4)),
            ),
            on(2, 2, 12, 12),
        ),
    ),
    Subject("unpooling", built(lambda: Wrapped(_unpool, nn.Conv2d(2, 2, 3, padding=1)), on(2, 2, 6, 6))),
    Subject(
        "rearrangements",
        built(
            chain(
                lambda: nn.Conv2d(2, 8, 1),
                lambda: nn.PixelShuffle(2),
                lambda: nn.ChannelShuffle(2),
                lambda: nn.PixelUnshuffle(2),
                lambda: nn.ZeroPad2d(1),
                lambda: nn.Unfold(2),
                lambda: nn.Fold((6, 6), 2),
                lambda: nn.ReflectionPad2d(1),
                lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
                lambda: nn.ReplicationPad2d(-1),
                lambda: nn.GLU(1),
                lambda: nn.CircularPad2d(1),
                lambda: nn.Softmax2d(),
                lambda: nn.Dropout2d(),
            ),
            on(2, 2, 4, 4),
        ),
    ),
    Subject("activations", built(lambda: _Sum([make() for make in _ACTIVATIONS]), on(2, 4), train=True), fast=True),
    Subject(
        "Bilinear of two views",
        built(lambda: Wrapped(lambda m, x: m(x[:, :2], x[:, 2:]), nn.Bilinear(2, 2, 3)), on(3, 4)),
    ),
    Subject(
        "distances",
        built(
            lambda: Wrapped(
                lambda m, x: torch.cdist(m(x), x, p=2.0) + functional.cosine_similarity(m(x), x, -1)[:, None],
                nn.Linear(4, 4),
            ),
            on(2, 5, 4),
        ),
    ),
    Subject(
        "cross entropy",
        built(
            lambda: Wrapped(lambda m, x, y: functional.cross_entropy(m(x), y), nn.Linear(4, 3)),
            on(5, 4),
            lambda: torch.randint(3, (5,)),
        ),
    ),
]
