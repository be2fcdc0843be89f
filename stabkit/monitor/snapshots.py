"""The last good state of a training, on the host: what was whole before a batch or a rate broke it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.randomness import as_tensors, random_state

SLOTS = 4  # snapshots, where memory allows: the newest may hold the first step of what is noticed a step or two later
_APART = 10  # training steps between two of them, at least
_SHARE = 0.01  # of the time of training that may be spent on them


@dataclass
class Snapshot:
    """The state of a training before the update of a step.

    Attributes:
        step: the training step.
        loss: its loss, NaN where none was read.
        learning_rates: of every group of every optimizer, in the update that led to this state.
        tensors: ``weights/NAME`` (the state dict) and ``optimizer/NUMBER/PARAMETER/KEY``, on the host.
        numbers: plain numbers of the optimizers' states, by the same names.
        random: the state of the random generators, as named tensors.
    """

    step: int
    loss: float
    learning_rates: list[float]
    tensors: dict[str, Tensor]
    numbers: dict[str, float]
    random: dict[str, Tensor] = field(default_factory=dict)
    written: Callable[[], None] | None = None  # waits for copies from a device

    def whole(self) -> dict[str, Tensor]:
        """All tensors, when the copies from a device are there."""
        if self.written is not None:
            self.written()
        return {**self.tensors, **{f"random/{name}": tensor for name, tensor in self.random.items()}}


class Snapshots:
    """A ring of snapshots within a bound of memory, taken so rarely that they cost about a hundredth of the time.

    Args:
        model: whose weights and buffers are kept.
        optimizers: whose states are kept.
        memory: bytes that the ring may take; 0 for none.
        sharded: whether this process holds a part of the parameters alone, of which none are taken.

    Attributes:
        why_none: why there are none, in words; empty where there may be.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], memory: int, *, sharded: bool = False
    ) -> None:
        self._model, self._optimizers, self._memory = model, list(optimizers), memory
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._ring: list[Snapshot] = []
        self._next, self._not_before = 0, 0.0
        self._rates: list[float] = []  # of the update before
        self.why_none = "its parameters are spread over processes" if sharded else "" if memory else "snapshot_memory=0"

    def look(self, step: int, loss: float) -> None:
        """Take a snapshot where one is due; call it at steps at which all is well, before the optimizer's step.

        Args:
            step: the training step.
            loss: its loss.
        """
        if self.why_none:
            return
        rates = [_rate(group["lr"]) for one in self._optimizers for group in one.param_groups if "lr" in group]
        before, self._rates = self._rates or rates, rates
        began = time.perf_counter()
        if step < self._next or began < self._not_before:
            return
        if self._ring and not _is_finite(self._ring[-1]):
            self._ring.pop()
        tensors, numbers = self._state()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        slots = min(SLOTS, self._memory // max(size, 1))
        if not slots:
            self.why_none = (
                f"one takes {size / 2**20:,.0f} MiB, more than snapshot_memory ({self._memory / 2**20:,.0f})"
            )
            self._ring = []
            return
        del self._ring[: max(0, len(self._ring) - slots)]
        oldest = self._ring.pop(0) if len(self._ring) == slots else None
        kept, wait = _copied(tensors, {} if oldest is None else oldest.tensors)
        self._ring.append(Snapshot(step, loss, before, kept, numbers, as_tensors(random_state()), wait))
        spent = time.perf_counter() - began
        self._next, self._not_before = step + _APART, began + spent / _SHARE

    def stop(self) -> None:
        """Take none any more, and let go of those that are held."""
        self.why_none, self._ring = "to take one failed", []

    def before(self, step: int) -> Snapshot | None:
        """The newest snapshot from before a training step whose numbers are all finite; None where there is none."""
        return next((each for each in reversed(self._ring) if each.step < step and _is_finite(each)), None)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for name, value in self._model.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"weights/{name}"] = value.detach()
        for name, value in self._of_optimizers():
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            elif isinstance(value, int | float):
                numbers[name] = value
        return tensors, numbers

    def _of_optimizers(self) -> Iterator[tuple[str, Any]]:
        for number, one in enumerate(self._optimizers):
            for parameter, state in one.state.items():
                name = self._names.get(id(parameter))
                for key, value in state.items() if name is not None else ():
                    yield f"optimizer/{number}/{name}/{key}", value


def _copied(tensors: dict[str, Tensor], held: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None] | None]:
    """Copies on the host, into the memory of an older snapshot where it fits; and what waits for them."""
    kept = {}
    device: torch.device | None = None
    for name, tensor in tensors.items():
        old = held.get(name)
        fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
        if tensor.device.type != "cpu":
            device = tensor.device
        if old is None or not fits:
            pinned = tensor.device.type == "cuda"
            old = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        kept[name] = old.copy_(tensor, non_blocking=True)
    if device is None:
        return kept, None
    event = getattr(torch, device.type).Event()
    event.record()
    return kept, event.synchronize


def _rate(value: Any) -> float:
    """A learning rate; NaN for one on a device, which to read would wait for it at every step."""
    return math.nan if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _is_finite(snapshot: Snapshot) -> bool:
    return all(bool(t.isfinite().all()) for t in snapshot.whole().values() if t.is_floating_point() and t.dim())
