"""What training on some samples of a batch does for the others, whose targets need not be known.

A loss is a function of the outputs, and its targets are within it. Outputs of the samples that are held out are cut off
the graph while the others train; what these come to is read off the loss with the outputs of those that trained put
back to what they were at first. That is exact where a loss is a sum over samples, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.remedies.applying import may_train, stood_in, trainable
from stabkit.diagnosis.remedies.usual_training import RATES, Update, adam, moved_by
from stabkit.errors import StabkitError
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of

_GAIN = 0.1  # of the loss of the samples held out: what is no trifle
_TIMES = 1.5  # as much
_ERRORS = 2.0  # standard errors over the samples: one chance in forty where nothing is gained
_GROUPS = 64  # of samples that are told apart, at most
_EVERY = 5  # steps between two looks at the others
_APART = 0.02  # of the loss: by how much the parts of a sum may miss the whole
_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"})

Within = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Learnt:
    """What training takes away of a loss, as shares of it; negative where it adds.

    Attributes:
        own: of the samples that are trained on.
        other: of the samples that are held out, at the best rate and moment for these.
        each: the same of each of them, or of each of a few dozen groups, in an order that is that of the batch.
        by_heart: of the samples that are trained on, at the best rate for them.
    """

    own: float
    other: float
    each: Tensor
    by_heart: float = math.nan

    def beats(self, plain: Learnt) -> bool:
        """Whether clearly more is learnt for the samples held out: no trifle, and no chance among so few samples.

        That it is no chance is said by the spread over the samples, or by as much more that is learnt of those that
        are trained on.
        """
        if not self.other > max(plain.other + _GAIN, _TIMES * plain.other):
            return False
        gain = self.each - plain.each
        surely = float(gain.mean()) > _ERRORS * float(gain.std()) / math.sqrt(len(gain))
        return surely or self.own > max(plain.own + _GAIN, _TIMES * plain.own)


class Dropping(FunctionCalls):
    """Every dropout at no more than a given share.

    Example:
        >>> with Dropping(0.0):
        ...     float(torch.nn.functional.dropout(torch.ones(8), 0.9).sum())
        8.0
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most
        self.dropped: list[float] = []

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(func) in _DROPOUTS:
            given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
            share = float(given.get("p", 0.5)) if given.get("training", given.get("train", True)) else 0.0
            self.dropped.append(share)
            if share > self.most:
                kwargs = {key: value for key, value in kwargs.items() if key != "p"}
                return func(given["input"], self.most, *args[2:], **{k: v for k, v in kwargs.items() if k != "input"})
        return func(*args, **kwargs)


def learnt(
    call: ForwardPass,
    loss: Any,
    steps: int,
    actions: Sequence[Action] = (),
    within: Within = nullcontext,
    samples: int | None = None,
) -> Learnt | None:
    """What Adam at its usual rates learns from every other sample of a batch; None where that cannot be told.

    Each half is held out once, and the mean is given. Dropout is off where a loss is read. The model, its buffers and
    the random state stay as they were.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar, and is a sum over samples.
        steps: of every training.
        actions: a remedy that is carried out before.
        within: makes what each training runs in.
        samples: how many there are; None for as many as the first input has rows.
    """
    count = next((len(t) for _, t in call.given if t.dim() > 0), 0) if samples is None else samples
    if count < 4 or not may_train(call.module):
        return None
    runs: list[Learnt] = []
    try:
        for rate in RATES:
            folds = []
            for fold in (0, 1):
                with stood_in(call.module, actions, within):
                    folds.append(_run(call, loss, adam(rate), steps, torch.arange(count) % 2 == fold))
            if any(found is None for found in folds):
                return None
            every = [found for found in folds if found is not None]
            own, other = (sum(getattr(found, name) for found in every) / 2 for name in ("own", "other"))
            runs.append(Learnt(own, other, torch.cat([found.each for found in every])))
    except (StabkitError, RuntimeError):
        return None
    best = max(runs, key=lambda run: run.other)
    return replace(best, by_heart=max(run.own for run in runs))


def _run(call: ForwardPass, loss: Any, update: Update, steps: int, trained: Tensor) -> Learnt | None:
    """One training of half of the samples; None where the loss is no sum over samples."""
    best, own, output_then = -math.inf, 0.0, None
    with call.kept(loss), torch.enable_grad():
        first = _read(call)
        scale = float(loss(first)) / 2
        if not _is_of_samples(first, len(trained)) or not (math.isfinite(scale) and scale > 0):
            return None
        weights = list(trainable(call.module).values())
        states: list[list[Tensor]] = [[] for _ in weights]
        for step in range(1, steps + 1):
            output = call.called()
            moved_by(loss(_mixed(output, output, trained)), weights, states, update, step)
            if step % _EVERY and step != steps:
                continue
            now = _read(call)
            mine, others, both = (
                2 * scale - float(loss(out)) for out in (_mixed(now, first, trained), _mixed(first, now, trained), now)
            )
            if not all(map(math.isfinite, (mine, others, both))):
                break
            if abs(mine + others - both) > _APART * max(2 * scale, abs(mine), abs(others)):
                return None
            own = mine / scale
            if others / scale > best:
                best, output_then = others / scale, now
        if output_then is None:
            return None
        groups = (~trained).nonzero().flatten().chunk(_GROUPS)
        falls = [2 * scale - float(loss(_mixed(output_then, first, _only(group, len(trained))))) for group in groups]
    shares = torch.tensor([len(group) for group in groups]) / float((~trained).sum())
    return Learnt(own, best, torch.tensor(falls) / (scale * shares))


def _only(group: Tensor, count: int) -> Tensor:
    """A mask of some samples."""
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, group, True)


def _read(call: ForwardPass) -> Any:
    """The output without dropout; other random numbers of the training stay what they are."""
    with torch.no_grad(), Dropping(0.0):
        return map_tensors(call.called(), torch.Tensor.detach)


def _is_of_samples(output: Any, count: int) -> bool:
    """Whether every float tensor has rows of samples, in their order, or samples along its second axis."""
    made = [t for _, t in named_tensors(output) if t.is_floating_point()]
    return bool(made) and all(t.numel() and _axis(t, count) is not None for t in made)


def _axis(tensor: Tensor, count: int) -> int | None:
    if tensor.dim() > 0 and len(tensor) % count == 0:
        return 0
    return 1 if tensor.dim() > 1 and tensor.shape[1] == count else None


def _mixed(output: Any, other: Any, chosen: Tensor) -> Any:
    """The rows of some samples of one output beside those of the other samples of another, without their graph."""
    rest = iter([t for _, t in named_tensors(other)])

    def mixed(tensor: Tensor) -> Tensor:
        held = next(rest)
        axis = _axis(tensor, len(chosen))
        if not tensor.is_floating_point() or axis is None:
            return tensor
        rows = chosen.to(tensor.device).repeat_interleave(tensor.shape[axis] // len(chosen))
        return torch.where(rows.reshape(-1, *[1] * (tensor.dim() - 1 - axis)), tensor, held.detach())

    return map_tensors(output, mixed)
