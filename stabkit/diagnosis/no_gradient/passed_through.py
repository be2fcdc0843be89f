"""Couplings that all leave the same entries of their input as they are, which nothing then ever changes.

A coupling layer of a normalising flow changes some entries by functions of the others. Where every layer has the same
mask, the entries that it keeps come out as they went in: whatever the parameters are, that part of the loss stays. A
masked or split state is right in each layer by itself, so only what holds from the input to the output is suspected,
and a turn between the layers is tried on a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.remedies.moved_weights import moved_weights
from stabkit.diagnosis.remedies.short_training import STEPS, clearly_better, short_training
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.hooks import hooked

_FEWEST = 2  # layers that can take turns
_REFERENCE = "Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP, 2017, section 3.5"


def passed_through_findings(run: TrainingRun) -> list[Finding]:
    """A finding where couplings pass the same entries on, all of them, and take turns in vain or with success."""
    if run.done.loss is None or not _may_pass(run):
        return []
    # couplings often begin as the identity, which says nothing: two sets of moved weights are looked at
    one, other = (_watched(run.call, seed) for seed in (0, 1))
    kept = one.kept_by_all(other)
    if kept is None or not _is_read(run, kept):
        return []
    paths = list(one.kept)
    axis = _turned(kept)
    if axis is None:
        return []
    turned = partial(_taking_turns, run.call.module, paths, axis)
    before, after = short_training(run.flow, run.loss), short_training(run.flow, run.loss, within=turned)
    if before is None or after is None or not clearly_better(after, before):
        return []
    count, size = int(kept.sum()), kept.numel()
    evidence = (
        f"{len(paths)} couplings ({listed(tuple(paths))}) all leave the same {count} of {size} entries of a sample as "
        f"they are, and so does all that the model does to them: whatever the parameters are, they come out as they "
        f"went in, and the loss reads them; tried on a copy with the entries turned round between the layers: {STEPS} "
        f"steps of plain SGD take the loss {before} as it is, {after} treated"
    )
    remedy = (
        "let the couplings take turns: give every second one the opposite mask, or permute the entries (a flip, a "
        "shuffle, an invertible 1x1 convolution) between them"
    )
    where = step_of(run.flow, paths[0])
    return [Finding("no_gradient", "warning", (where,), paths[0], 1.0, evidence, remedy, _REFERENCE)]


def _may_pass(run: TrainingRun) -> bool:
    """Whether the model returns something of the shape of an input."""
    shapes = {t.shape for _, t in named_tensors(list(run.call.inputs)) if t.is_floating_point() and t.dim() > 1}
    return any(t.shape in shapes for _, t in named_tensors(run.done.output))


def _watched(call: ForwardPass, seed: int) -> _Couplings:
    found = _Couplings(call.module)
    with moved_weights(call.module, seed):
        evaluated(call, None, lambda _: found.watching(), training=True)
    return found


class _Couplings:
    """Modules of one class that leave entries of what they are given as they are, and change others.

    Attributes:
        kept: by path, which entries are left as they are, for every call the same.
        first: what the first of them was given.
        last: what the last of them gave out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._all: dict[str, Tensor] = {}
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    @property
    def kept(self) -> dict[str, Tensor]:
        return {p: m for p, m in self._all.items() if not any(other.startswith(f"{p}.") for other in self._all)}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what modules do while a call runs."""
        handles = [
            module.register_forward_hook(partial(self._note, path))
            for path, module in self._model.named_modules()
            if path and next(module.parameters(), None) is not None
        ]
        with hooked(handles):
            yield

    def _note(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        made = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(given, Tensor) or not isinstance(made, Tensor) or given.shape != made.shape:
            return
        if given.dim() < 2 or not given.is_floating_point() or len(given) < 2:
            return
        same = (given == made).all(0)
        if not bool(same.any()) or bool(same.all()) or not bool((given != given[:1]).any(0)[same].all()):
            return
        self._all[path] = same if path not in self._all else self._all[path] & same
        self.first = given.detach() if self.first is None else self.first
        self.last = made.detach()

    def kept_by_all(self, other: _Couplings) -> Tensor | None:
        """What all of several couplings leave as it is, with these weights and with others; None where nothing is."""
        masks = [*self.kept.values(), *other.kept.values()]
        if len(self.kept) < _FEWEST or self.kept.keys() != other.kept.keys() or len({m.shape for m in masks}) != 1:
            return None
        if self.first is None or self.last is None or self.first.shape != self.last.shape:
            return None
        kept = torch.stack(masks).all(0) & (self.first == self.last).all(0)
        return kept if bool(kept.any()) else None


def _is_read(run: TrainingRun, kept: Tensor) -> bool:
    """Whether the model returns an input with what was kept in it, and the loss reads that."""
    given = [t for _, t in named_tensors(list(run.call.inputs)) if t.shape[1:] == kept.shape]
    for _, tensor in named_tensors(run.done.output):
        if run.done.loss is None or not tensor.requires_grad or tensor.shape[1:] != kept.shape:
            continue
        (gradient,) = torch.autograd.grad(run.done.loss, [tensor], retain_graph=True, allow_unused=True)
        same = any(x.shape == tensor.shape and bool((tensor.detach() == x)[:, kept].all()) for x in given)
        if same and gradient is not None and bool((gradient[:, kept] != 0).any()):
            return True
    return False


def _turned(kept: Tensor) -> int | None:
    """The axis of a batch along which to turn entries round, so that fewest of those that are kept are kept again."""
    overlaps = {axis + 1: int((kept & kept.flip(axis)).sum()) for axis in range(kept.dim())}
    best = min(overlaps, key=lambda axis: overlaps[axis])
    return best if overlaps[best] < int(kept.sum()) else None


@contextlib.contextmanager
def _taking_turns(model: nn.Module, paths: list[str], axis: int) -> Iterator[None]:
    """Every coupling but the first is given its entries the other way round."""

    def turn(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flip(axis), *args[1:])

    handles = [model.get_submodule(path).register_forward_pre_hook(turn) for path in paths[1:]]
    with hooked(handles):
        yield
