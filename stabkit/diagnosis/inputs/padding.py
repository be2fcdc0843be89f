"""Padding as the data show it: one value that fills the ends of sequences of different lengths and occurs nowhere else.

No name of an argument and no convention is asked: what is padding is read off the tensors that a model is given. An
output that is read behind it has forgotten what came before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LEARNT, Finding
from stabkit.diagnosis.inputs.features import changed
from stabkit.diagnosis.remedies.usual_training import ADAM, RATES, adam, learns_only_treated, left_after
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass

_SEEN = 2  # positions in a row that a filled end has at least, somewhere
_FILLED = 4  # positions that are filled up in all at least: fewer may end alike by chance
_FEWEST = 3  # positions that a sequence has at least
_STEPS = 50  # of a trial
_ALIKE = 0.25  # of the spread of the outputs over samples that there is with padding in front
_REFERENCE = "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.rnn.pack_padded_sequence.html"


def padded(tensor: Tensor, axis: int = 1) -> Tensor | None:
    """Which positions of tokens (samples, positions), or vectors (samples, positions, features), are filled up.

    Args:
        tensor: tokens, or a mask of zeros and ones, or vectors, of which those of zeros alone count.
        axis: along which positions lie; samples lie along the other of the first two.

    Returns:
        Of shape (samples, positions), True where it is padding; None where none is seen.

    Example:
        >>> padded(torch.tensor([[5, 2, 7, 4], [3, 0, 0, 0], [6, 4, 2, 0]])).sum(1)
        tensor([0, 3, 1])
        >>> padded(torch.tensor([[5, 2, 7, 4], [3, 8, 1, 6]])) is None
        True
    """
    if tensor.dim() not in (2, 3) or tensor.layout != torch.strided or tensor.is_complex():
        return None
    if tensor.dim() == 2 and tensor.is_floating_point() and not bool(((tensor == 0) | (tensor == 1)).all()):
        return None  # features of samples
    tokens = tensor if tensor.dim() == 2 else (tensor == 0).all(dim=2)
    tokens = tokens.detach() if axis == 1 else tokens.detach().T
    if tokens.shape[0] < 2 or tokens.shape[1] < _FEWEST:
        return None
    right = _filled(tokens, tensor.dim() == 3)
    if right is not None:
        return right
    left = _filled(tokens.flip(1), tensor.dim() == 3)
    return None if left is None else left.flip(1)


def _filled(tokens: Tensor, zeros: bool) -> Tensor | None:
    for value in (True,) if zeros else dict.fromkeys(tokens[:, -1].tolist()):
        same = tokens == value
        ends = same.flip(1).cumprod(1).flip(1).bool()
        lengths = ends.sum(1)
        longest = int(lengths.max())
        if longest < _SEEN or longest == tokens.shape[1] or int(lengths.min()) == longest:
            continue
        if bool((same == ends).all()) and int(lengths.sum()) >= _FILLED:
            return ends
    return None


def padding_of(tensor: Tensor) -> Tensor | None:
    """What `padded` sees of tokens and vectors along the second axis; of a mask nobody knows which end is filled up.

    Example:
        >>> padding_of(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])) is None
        True
    """
    if tensor.layout != torch.strided or tensor.is_complex() or not tensor.numel():
        return None
    if tensor.dim() == 2 and (tensor.dtype == torch.bool or not float(tensor.max()) - float(tensor.min()) >= 2):
        return None
    return padded(tensor)


def is_time_along(tensor: Tensor, axis: int) -> bool:
    """Whether sequences end, filled up, along one of the first two axes and not along the other.

    Example:
        >>> tokens = torch.tensor([[5, 2, 7, 4], [3, 0, 0, 0], [6, 4, 2, 0]])
        >>> is_time_along(tokens, 1), is_time_along(tokens, 0)
        (True, False)
    """
    return padded(tensor, axis) is not None and padded(tensor, 1 - axis) is None


def padded_end_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a few steps learn with padding in front of sequences, and not with padding behind them.

    What a recurrence has read is forgotten over the padding that follows, and all samples come out alike. With every
    row rolled, so that padding lies in front of it, the last position is its last token: the same model is trained for
    a few steps on both.
    """
    given = run.call.given
    filled = [(name, t, p) for name, t in given if (p := padding_of(t.detach())) is not None and bool(p[:, -1].any())]
    if not filled or run.done.loss is None:
        return []
    name, tensor, padding = filled[0]
    lengths = (~padding).sum(1)
    front = changed(run.call, lambda t: _rolled(t, padding) if t.shape[:2] == padding.shape else t)
    behind, before = (_spread(each, len(padding)) for each in (run.call, front))
    if not behind < _ALIKE * before:
        return []
    begun = training_pass(front, run.loss, differentiate=False).loss
    plain, treated = (left_after(c, run.loss, [adam(r) for r in RATES], steps=_STEPS) for c in (run.call, front))
    if begun is None or plain is None or treated is None:
        return []
    first, start = float(run.done.loss.detach()), float(begun.detach())
    if not (first > 0 and learns_only_treated(first, plain * first, treated * start)):
        return []
    token = f"the rest is token {int(tensor[padding][0])}" if tensor.dim() == 2 else "the rest is zeros"
    evidence = (
        f"rows of the input {name!r} hold {int(lengths.min())} to {int(lengths.max())} of {padding.shape[1]} positions "
        f"and {token}: what is returned is read behind that padding, and samples come out alike (their outputs spread "
        f"by {behind:.2g}, and with padding in front by {before:.2g}); {_STEPS} steps of {ADAM} take the loss from "
        f"{first:.3g} to {plain * first:.3g} as it is, and from {start:.3g} to {treated * start:.3g} with every row "
        "rolled so that its padding lies in front"
    )
    return [
        Finding(
            kind="no_influence",
            severity="warning",
            steps=(0,),
            module_path="",
            confidence=1.0,
            evidence=evidence,
            remedy="read the output at the last real token of every sample, or pack the sequences "
            "(pack_padded_sequence) and take the last state; or pad in front",
            reference=_REFERENCE,
            numbers={
                "shortest": float(lengths.min()),
                "longest": float(lengths.max()),
                "spread": behind,
                LEARNT: treated * start / (plain * first),
            },
        )
    ]


def _rolled(tensor: Tensor, padding: Tensor) -> Tensor:
    """Every row rolled so that what fills its end lies in front of it."""
    count = padding.shape[1]
    places = (torch.arange(count) - padding.cpu().sum(1, keepdim=True)) % count
    index = places.to(tensor.device).reshape(*places.shape, *[1] * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(tensor.shape))


def _spread(call: ForwardPass, count: int) -> float:
    """Root mean square of what outputs of samples differ by from their mean."""
    outputs = [t for _, t in named_tensors(evaluated(call).output) if t.is_floating_point() and t.dim() > 0]
    rows = [t.double().reshape(count, -1) for t in outputs if len(t) == count]
    return float(torch.cat([t - t.mean(0) for t in rows], 1).square().mean().sqrt()) if rows else 0.0
