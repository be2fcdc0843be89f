"""Masks that say the contrary of what is meant: attention that sees padding alone, or a mask that masks nothing.

Padding is read off the inputs, and what attention sees off its masks and its weights: True means masked in
`torch.nn.MultiheadAttention`, and kept in `scaled_dot_product_attention`; 1 means kept in the models of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.inputs.mask_arguments import mask_arguments
from stabkit.diagnosis.inputs.padding import padding_of
from stabkit.diagnosis.remedies.short_training import compared, short_training, worse
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.attentions import masks_given
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line

_BLOCKED = -1e4  # what is added to scores so that no weight is left, in any dtype
_MHA, _SDPA, _SOFTMAX = "multi_head_attention_forward", "scaled_dot_product_attention", "softmax"
_CONVENTIONS = {
    _MHA: "in nn.MultiheadAttention and nn.Transformer True means masked",
    _SDPA: "in scaled_dot_product_attention True means kept",
    _SOFTMAX: "what is to be masked is filled with -inf before the softmax",
}
_REFERENCE = (
    "https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html; "
    "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
)


@dataclass(frozen=True)
class Seen:
    """What one attention sees.

    Attributes:
        name: the function.
        path: the module that runs it.
        line: the line that calls it.
        keys: ``(samples, keys)``, those that some query gives weight; None where no mask tells.
        added: a mask of zeros and ones in floats, which are added to the scores; None where there is none.
    """

    name: str
    path: str
    line: str
    keys: Tensor | None
    added: Tensor | None = None


def mask_findings(flow: Flow, loss: Any) -> list[Finding]:
    """One finding for all attentions whose masks are the wrong way round, one for masks that mask nothing."""
    call = flow.forward_pass
    given = [t for _, t in call.given if t.device.type != "meta"]
    filled = [(t, p) for t in given if (p := padding_of(t.detach())) is not None]
    paddings = [p for _, p in filled]
    if not any("Softmax" in name or "Attention" in name for name in map(operation, flow.recorded.graph.nodes)):
        return _of_no_influence(flow, filled)
    if not paddings and not flow.recorded.recording.masked:
        return []
    seen: list[Seen] = []
    evaluated(call, mode=lambda running: _Reading(running, {len(p) for p in paddings}, seen))
    found = []
    turned = [each for each in seen if any(_is_turned(each.keys, p) for p in paddings)]
    right = [each for each in seen if any(_is_right(each.keys, p) for p in paddings)]
    if turned and not right:
        found.append(_of_turned(flow, loss, turned, len(seen)))
    adding = [each for each in seen if each.added is not None]
    if adding:
        found.append(_of_adding(flow, adding, len(seen)))
    return found or _of_no_influence(flow, filled)


def _of_no_influence(flow: Flow, filled: Sequence[tuple[Tensor, Tensor]]) -> list[Finding]:
    """Tokens that change nothing while their padding does: exchanged among each other, every output stays the same."""
    call = flow.forward_pass
    given = [t for _, t in call.given if t.is_floating_point() and t.dim() > 1]
    if len(filled) != 1 or any(t is not filled[0][0] for t in given):
        return []  # tokens may be there for the sake of their lengths alone, beside what was made of them
    tensor, padding = filled[0]
    places = (~padding).to(tensor.device)
    order = torch.randperm(int(places.sum()), generator=torch.Generator().manual_seed(0)).to(tensor.device)
    exchanged = tensor.detach().clone()
    exchanged[places] = tensor.detach()[places][order]
    if torch.equal(exchanged, tensor):
        return []
    plain, tokens, both = (_returned(call, tensor, other) for other in (tensor, exchanged, tensor.roll(1, 0)))
    if not plain or not _same(plain, tokens) or _same(plain, both):
        return []
    evidence = (
        "what the model returns depends on the padding alone: with tokens exchanged among the places where there is "
        "none, every output stays the same bit for bit; a mask is the wrong way round"
    )
    return [_finding(flow, Seen("", "", "", None), "critical", evidence, "turn the mask round: ~mask, or 1 - mask", {})]


def _returned(call: ForwardPass, tensor: Tensor, other: Tensor) -> list[Tensor]:
    """What the model returns with another tensor in the place of one."""
    return [t for _, t in named_tensors(evaluated(call, lambda t: other if t is tensor else t).output)]


def _same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    pairs = zip(ones, others, strict=False)
    return len(ones) == len(others) and all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)


def _is_turned(keys: Tensor | None, padding: Tensor) -> bool:
    """Whether padding alone is seen, of all sequences that have some."""
    if keys is None or keys.shape != padding.shape:
        return False
    padding = padding.to(keys.device)  # what a model is given may be moved to where it is
    some = padding.any(1)
    return bool((keys == padding)[some].all())


def _is_right(keys: Tensor | None, padding: Tensor) -> bool:
    return keys is not None and keys.shape == padding.shape and bool((keys == ~padding.to(keys.device)).all())


class _Reading(FunctionCalls):
    """Notes what every attention sees."""

    def __init__(self, running: Evaluation, samples: set[int], seen: list[Seen]) -> None:
        super().__init__()
        self._running, self._samples, self._seen = running, samples, seen

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name = name_of(func)
        if name not in _CONVENTIONS:
            return out
        masks = masks_given(func, args, kwargs)
        keys = self._by_weight(out) if name == _SOFTMAX else self._by_mask(name, masks)
        added = next((m for m in masks if _adds(m)), None)
        self._seen.append(Seen(name, self._running.recording.running, calling_line(), keys, added))
        return out

    def _by_weight(self, out: Tensor) -> Tensor | None:
        """Keys along the last axis that have weight, where the rest is exactly zero."""
        for samples in self._samples:
            if out.dim() > 1 and len(out) % samples == 0:
                rows = out.detach().reshape(samples, -1, out.shape[-1])
                keys = (rows != 0).any(1)
                return keys if not bool(keys.all()) else None
        return None

    def _by_mask(self, name: str, masks: Sequence[Tensor]) -> Tensor | None:
        for mask in masks:
            kept = _kept(name, mask)
            for samples in self._samples:
                if mask.dim() > 1 and len(mask) % samples == 0:
                    return kept.reshape(samples, -1, mask.shape[-1]).any(1)
        return None


def _kept(name: str, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask if name == _SDPA else ~mask
    return mask > _BLOCKED


def _adds(mask: Tensor) -> bool:
    """Whether a mask of floats holds zeros and ones alone, those of a triangle or of padding, and is added so."""
    if not mask.is_floating_point() or mask.dim() < 2 or mask.shape[-1] < 2:
        return False
    ones, zeros = mask == 1, mask == 0
    if not bool((ones | zeros).all()) or not bool(ones.any()) or not bool(zeros.any()):
        return False
    flat = ones.reshape(-1, mask.shape[-1]).long()
    return bool(((flat.diff(dim=1) >= 0).all(1) | (flat.diff(dim=1) <= 0).all(1)).all())


def _of_turned(flow: Flow, loss: Any, turned: Sequence[Seen], count: int) -> Finding:
    first = turned[0]
    evidence = (
        f"{_places(turned)} of {count} attentions see the padding alone and none of the tokens: the mask is the wrong "
        f"way round ({_CONVENTIONS[first.name]}"
    )
    named = "attention_mask" in flow.forward_pass.kwargs
    evidence += "; the attention_mask of transformers is 1 where tokens are)" if named else ")"
    plain, treated = short_training(flow, loss), short_training(flow, loss, within=_Turning)
    if worse(plain, treated):
        evidence += compared(plain, treated, "with it turned round")
    remedy = f"turn the mask round: ~mask where it is made or passed on{_as_given(flow, first)}"
    return _finding(flow, first, "critical", evidence, remedy, {"attentions": float(len(turned))})


def _of_adding(flow: Flow, adding: Sequence[Seen], count: int) -> Finding:
    first = adding[0]
    evidence = (
        f"{_places(adding)} of {count} attentions are given a mask of zeros and ones in floats: floats are added to "
        "the scores, so that nothing is masked"
    )
    remedy = (
        f"give the mask{_as_given(flow, first)} as booleans ({_CONVENTIONS[first.name]}), or fill it with -inf where "
        "nothing may be seen"
    )
    return _finding(flow, first, "warning", evidence, remedy, {"attentions": float(len(adding))})


def _as_given(flow: Flow, first: Seen) -> str:
    """The arguments by which the module that is called takes a mask, in words; empty where it is none of torch."""
    named = mask_arguments(flow.forward_pass.module, first.path) if first.name == _MHA else None
    if named is None:
        return ""
    outer, names = named
    return f" ({names.causal} or {names.padding} of {outer or 'the model'})"


def _places(found: Sequence[Seen]) -> str:
    first = found[0]
    where = first.path or first.line
    return f"{len(found)} ({where}{' and others' if len(found) > 1 else ''})"


class _Turning(FunctionCalls):
    """Turns the masks of attention round."""

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        name = name_of(func)
        key: str = {_MHA: "key_padding_mask", _SDPA: "attn_mask"}.get(name, "")
        if isinstance(kwargs.get(key), Tensor):
            kwargs[key] = _turned(kwargs[key])
        elif name == _SDPA and len(args) > 3 and isinstance(args[3], Tensor):
            args = (*args[:3], _turned(args[3]), *args[4:])
        return func(*args, **kwargs)


def _turned(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    return torch.zeros_like(mask).masked_fill(mask > _BLOCKED, -torch.inf)


def _finding(flow: Flow, first: Seen, severity: str, evidence: str, remedy: str, numbers: dict[str, float]) -> Finding:
    return of_module(flow, "mask", severity, first.path, evidence, remedy, _REFERENCE, numbers)
