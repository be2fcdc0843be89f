"""The argument by which a mask is given, as the module that is called names it: ``mask``, ``src_mask``, ``attn_mask``.

The same mask has other names in every class of `torch.nn`, and in functions. What counts is the class whose ``forward``
stands in the code of a model: the outermost of torch around an attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class MaskArguments:
    """What a class calls its masks.

    Attributes:
        causal: the mask of pairs of positions that hides what comes later.
        padding: the mask of keys of every sample.
    """

    causal: str
    padding: str


_OF_CLASSES: dict[type[nn.Module], MaskArguments] = {
    nn.Transformer: MaskArguments("tgt_mask", "tgt_key_padding_mask"),
    nn.TransformerEncoder: MaskArguments("mask", "src_key_padding_mask"),
    nn.TransformerEncoderLayer: MaskArguments("src_mask", "src_key_padding_mask"),
    nn.TransformerDecoder: MaskArguments("tgt_mask", "tgt_key_padding_mask"),
    nn.TransformerDecoderLayer: MaskArguments("tgt_mask", "tgt_key_padding_mask"),
    nn.MultiheadAttention: MaskArguments("attn_mask", "key_padding_mask"),
}
_CROSS = "multihead_attn"  # what torch calls the attention of a decoder over a memory


def mask_arguments(model: nn.Module, path: str) -> tuple[str, MaskArguments] | None:
    """The outermost module of torch that attends at a path, by path, and what it calls its masks; None without one.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        >>> model = nn.Sequential(nn.Embedding(3, 4), nn.TransformerEncoder(layer, 1))
        >>> mask_arguments(model, "1.layers.0.self_attn")
        ('1', MaskArguments(causal='mask', padding='src_key_padding_mask'))
    """
    modules = dict(model.named_modules())
    parts = path.split(".")
    for length in range(len(parts) + 1):
        outer = ".".join(parts[:length])
        names = next((found for kind, found in _OF_CLASSES.items() if isinstance(modules.get(outer), kind)), None)
        if names is None:
            continue
        inner = parts[length:]
        if isinstance(modules[outer], nn.Transformer) and inner[:1] == ["encoder"]:
            names = MaskArguments("src_mask", "src_key_padding_mask")
        if inner[-1:] == [_CROSS]:
            names = MaskArguments("memory_mask", "memory_key_padding_mask")
        return outer, names
    return None
