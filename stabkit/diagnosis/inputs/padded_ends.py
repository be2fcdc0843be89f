"""Outputs that are read behind padding: at the last position, long after most sequences have ended.

What a recurrence has read is forgotten over the padding that follows, and all samples come out alike. With every row
rolled, so that padding lies in front of it, the last position is its last token: the same model is trained for a few
steps on both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs.features import changed
from stabkit.diagnosis.inputs.padding import padding_of
from stabkit.diagnosis.remedies.usual_training import RATES, adam, learns_only_treated, left_after
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass

_STEPS = 50  # of a trial
_ALIKE = 0.25  # of the spread of the outputs over samples that there is with padding in front
_REFERENCE = "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.rnn.pack_padded_sequence.html"


def padded_end_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a few steps learn with padding in front of sequences, and not with padding behind them."""
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
        f"by {behind:.2g}, and with padding in front by {before:.2g}); {_STEPS} steps of Adam take the loss from "
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
            numbers={"shortest": float(lengths.min()), "longest": float(lengths.max()), "spread": behind},
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
