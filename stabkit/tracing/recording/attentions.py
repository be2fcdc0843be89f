"""What attention weighs its keys by: the scores of some rows of a call, and what they say of its softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation has it
from torch import Tensor

#: The attentions of torch, and the names of the masks that they take.
ATTENTIONS: dict[Any, tuple[str, ...]] = {
    F.multi_head_attention_forward: ("key_padding_mask", "attn_mask"),
    F.scaled_dot_product_attention: ("attn_mask",),
}
_PLACE = 3  # of the mask among the arguments of scaled_dot_product_attention

FLAT = 0.01  # 1 - sum p^2 of a row under which its softmax passes nothing on
FEWEST_KEYS = 3  # that a row must see to count

# A sample is bounded, and has every head of ordinary models. Scores of all keys but a few are those of each other.
_HEADS, _ROWS, _KEYS = 32, 32, 1024
# A score so far below the largest of its row is that of a key that is masked: by -inf, by the least number of its
# dtype, or by the -10000 that is added to it in older models of transformers.
_HIDDEN = 9000.0


def masks_given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The masks that an attention of torch is called with; none of other functions."""
    found = [kwargs.get(name) for name in ATTENTIONS.get(func, ())]
    if func is F.scaled_dot_product_attention and len(args) > _PLACE:
        found.append(args[_PLACE])
    return [mask.detach() for mask in found if isinstance(mask, Tensor)]


def flat_rows(p: Tensor) -> Tensor:
    """Which rows of weights give all to one key, so that their softmax passes no gradient on; ``(rows,)``."""
    flat: Tensor = 1 - p.square().sum(-1) < FLAT
    return flat


def entropies(p: Tensor, keys: Tensor) -> Tensor:
    """The entropy of rows of weights over that of equal weights.

    Args:
        p: weights, ``(..., keys)``.
        keys: how many keys each row sees, at least 2; ``(...)``.
    """
    found: Tensor = torch.special.entr(p).sum(-1) / keys.log()
    return found


def of_scores(scores: Tensor) -> Tensor:
    """The largest logit, the mean entropy and the share of flat rows of a written-out softmax; ``(3,)``.

    A logit is measured from the mean of its row, since what is added to a whole row changes no softmax. What is not
    known, since no row sees enough keys, is NaN.

    Args:
        scores: that a softmax along the last axis is taken of, ``(..., queries, keys)``.

    Example:
        >>> of_scores(torch.zeros(2, 4, 8)).round(decimals=3).tolist()
        [0.0, 1.0, 0.0]
    """
    rows = _of_heads(scores)[..., _rows(scores.shape[-2]), _keys(scores.shape[-1])].float()
    return _statistics(rows, rows)


def of_attention(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The same of a call of one of ``ATTENTIONS``; None where its form is none that is known.

    Args:
        func: the function.
        args: of the call.
        kwargs: of the call.
    """
    if func is F.scaled_dot_product_attention:
        return _scaled_dot_product(*args, **kwargs)
    return _multi_head(*args, **kwargs)


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if query.dim() < 2 or query.is_nested or query.shape[-1] == 0:
        return None
    length, count = query.shape[-2], key.shape[-2]
    rows, keys = _rows(length), _keys(count)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    key = key.expand(*query.shape[:-2], *key.shape[-2:])
    q, k = _of_heads(query)[..., rows, :].float(), _of_heads(key)[..., keys, :].float()
    logits = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = logits
    if is_causal:
        seen = torch.ones(length, count, dtype=torch.bool, device=query.device).tril()[rows, keys]
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        mask = _of_heads(attn_mask.expand(*query.shape[:-1], count))[..., rows, keys]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return _statistics(logits, scores)


def _multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    *_: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    is_causal: bool = False,
    **__: Any,
) -> Tensor | None:
    """Projects queries and keys as `nn.MultiheadAttention` does, which has ``(length, batch, width)``."""
    if query.dim() != 3 or query.is_nested:
        return None
    weights: tuple[Tensor | None, ...] = (q_proj_weight, k_proj_weight)
    if not use_separate_proj_weight and in_proj_weight is not None:
        weights = in_proj_weight.chunk(3)[:2]
    biases: tuple[Tensor | None, ...] = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
    batch = query.shape[1]
    few = slice(None, None, -(-batch // max(1, _HEADS // num_heads)))
    q, k = (
        F.linear(x[:, few], w, b).reshape(len(x), -1, num_heads, len(w) // num_heads).permute(1, 2, 0, 3)
        for x, w, b in zip((query, key), weights, biases, strict=True)
        if w is not None
    )
    mask = attn_mask
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(batch, num_heads, *mask.shape[1:])[few]
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
    if key_padding_mask is not None:
        padded = key_padding_mask[few, None, None]
        hidden = torch.zeros_like(padded, dtype=q.dtype).masked_fill(padded, -torch.inf) if (
            padded.dtype == torch.bool
        ) else padded  # fmt: skip
        mask = hidden if mask is None else mask + hidden
    return _scaled_dot_product(q, k, k, mask)


def _statistics(logits: Tensor, scores: Tensor) -> Tensor:
    """Of logits, and of the same with whatever masks add to them; ``(..., rows, keys)``."""
    hidden = scores < scores.amax(-1, keepdim=True) - _HIDDEN
    keys = (~hidden).sum(-1)
    counted = keys >= FEWEST_KEYS
    mean = logits.masked_fill(hidden, 0.0).sum(-1) / keys
    largest = logits.masked_fill(hidden, -torch.inf).amax(-1) - mean
    p = scores.softmax(-1)
    entropy = entropies(p, keys.clamp_min(FEWEST_KEYS).to(p.dtype))
    found = torch.stack([largest, entropy, flat_rows(p).to(p.dtype)]).flatten(1)
    counted = counted.flatten()
    number = counted.sum()
    means = (found * counted).nan_to_num(0.0, torch.inf, -torch.inf).sum(1) / number  # 0 / 0 where none counts
    most = found[0].masked_fill(~counted, -torch.inf).amax().masked_fill(number == 0, torch.nan)
    return torch.cat([most[None], means[1:]])


def _of_heads(tensor: Tensor) -> Tensor:
    """Some samples and heads of ``(..., heads, rows, columns)``, evenly."""
    if tensor.dim() <= 2:
        return tensor
    if tensor.dim() == 3:  # samples, or samples and heads in one: an odd stride comes to every head
        count = len(tensor)
        return tensor if count <= _HEADS else tensor[:: -(-count // _HEADS) | 1]
    tensor = tensor.flatten(0, -4)
    samples, heads = tensor.shape[:2]
    kept = -(-heads // _HEADS)
    return tensor[:: -(-samples // max(1, _HEADS // heads)), ::kept]


def _rows(count: int) -> slice:
    """Rows of a matrix of scores, the last among them, which sees the most keys where a mask is causal."""
    stride = max(1, -(-count // _ROWS))
    return slice((count - 1) % stride, None, stride)


def _keys(count: int) -> slice:
    return slice(None, None, max(1, -(-count // _KEYS)))
