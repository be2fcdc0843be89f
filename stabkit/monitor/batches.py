"""What goes into the model at every training step, so that a batch that is out of range is named."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.capsules import RecordedCall
from stabkit.diagnosis import factor
from stabkit.monitor.inputs import MOST_CALLS
from stabkit.monitor.measurement import in_backward
from stabkit.monitor.watching import watch
from stabkit.tracing.recording.containers import map_tensors, named_tensors

# An odd batch is only asked for where the loss or a record stands out, so that what is odd by itself costs no alarm.
OUT = 10.0  # times the largest of the batches that were looked at
_FEW = 3  # of these, at least
_KEPT = 50
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEEP = 3  # levels of containers
_HELD = 2**28  # bytes of the micro-batches of a step that are held on to beside the newest


@dataclass(frozen=True)
class Odd:
    """A batch that is unlike those before.

    Attributes:
        step: its training step.
        text: what is odd, in words.
        call: the call of the model that had it.
    """

    step: int
    text: str
    call: RecordedCall


@dataclass(frozen=True, eq=False)
class _Held:
    """One call of the model: its step, arguments, and whether it was the first of the step."""

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first: bool

    @cached_property
    def size(self) -> int:
        """Bytes of its tensors."""
        tensors = (tensor for _, tensor in named_tensors(_named(self.args, self.kwargs), _DEEP))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Batches:
    """Holds on to the arguments of the newest calls of the model, by reference, and knows the range of some before.

    Those are the calls of one training step, of which gradient accumulation makes several, and of the step before where
    losses come late. Of micro-batches that are large the newest are held.

    Args:
        model: as it is called.

    Attributes:
        model: that one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: deque[_Held] = deque()
        self._usual: dict[str, deque[float]] = {}
        self._by_design: set[str] = set()  # inputs that hold what is not finite and train well: masks, missing values
        self._step = 0
        self._undo: Callable[[], None] | None = None

    def on(self, step: int) -> None:
        """Watch the calls of the model from a step on."""
        self._step = step
        if self._undo is None:
            self._undo = watch(self.model, None, self._before)

    def off(self) -> None:
        """Stop, and let go of what is held."""
        if self._undo is not None:
            self._undo()
        self._undo = None
        self._held.clear()

    def passed(self, step: int, *, late: bool) -> None:
        """Let go of the batches that nobody can ask for any more.

        Args:
            step: the next training step.
            late: whether the loss of the step before is not known yet.
        """
        self._step = step
        while self._held and self._held[0].step < step - late:
            self._held.popleft()

    def see(self) -> None:
        """Take note of the range of the newest batch; call it at steps that are recorded and at which all is well."""
        for name, largest in _ranges(self._newest()).items():
            if math.isfinite(largest):
                self._usual.setdefault(name, deque(maxlen=_KEPT)).append(largest)
            else:
                self._by_design.add(name)

    def odd(self, step: int) -> Odd | None:
        """What is odd about the batch of a step, of several the first that is; None where none is, or is still held."""
        held = [each for each in self._held if each.step == step]
        for number, each in enumerate(held):
            odd = self._odd(step, (each.args, each.kwargs))
            if odd is not None:
                # where some were let go, the place of the others is not known
                several = len(held) > 1 and held[0].first
                where = f"in micro-batch {number} of {len(held)} (from 0) " if several else ""
                return replace(odd, text=where + odd.text)
        return None

    def _odd(self, step: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Odd | None:
        for name, largest in _ranges(call).items():
            if name in self._by_design:
                continue
            text = self._told(name, largest, dict(named_tensors(_named(*call), _DEEP)).get(name))
            if text:
                args, kwargs = (map_tensors(part, _host) for part in call)
                return Odd(step, text, RecordedCall(args, kwargs, {}))
        return None

    def _told(self, name: str, largest: float, tensor: Tensor | None) -> str:
        if not math.isfinite(largest) and tensor is not None:
            bad = ~tensor.detach().isfinite()
            rows = bad.flatten(1).any(1).nonzero().flatten().tolist() if bad.dim() > 1 else []
            where = f", in sample {rows[0]}" if len(rows) == 1 else f", in {len(rows)} samples" if rows else ""
            count = int(bad.sum())
            what = "a number that is" if count == 1 else f"{count} numbers that are"
            return f"the batch holds {what} not finite in its input {name}{where}"
        usual = self._usual.get(name, ())
        if len(usual) >= _FEW and largest > OUT * max(usual) > 0:
            times = factor(math.log(largest / max(usual)))
            return (
                f"the batch is out of range: values up to {largest:.3g} in its input {name}, {times} times the largest "
                f"of {len(usual)} batches looked at before"
            )
        return ""

    def _newest(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._held[-1].args, self._held[-1].kwargs) if self._held else ((), {})

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or in_backward():
            return
        first = not self._held or self._held[-1].step != self._step
        self._held.append(_Held(self._step, args, kwargs, first))
        if first:
            return
        mine = [each for each in self._held if each.step == self._step]
        while len(mine) > 1 and (sum(each.size for each in mine) > _HELD or len(mine) > MOST_CALLS):
            self._held.remove(mine.pop(0))


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**{str(i): value for i, value in enumerate(args)}, **kwargs}


def _ranges(call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, float]:
    """The largest modulus in every floating tensor of a call, by its name; NaN or infinite where one is."""
    named = [(n, t) for n, t in named_tensors(_named(*call), _DEEP) if _has_range(t)]
    if not named:
        return {}
    with torch.no_grad():
        largest = [t.detach().abs().amax().float().cpu() for _, t in named]
    return {name: float(value) for (name, _), value in zip(named, largest, strict=True)}


def _has_range(tensor: Tensor) -> bool:
    """Whether a tensor is dense, of ordinary floats, and there."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
    plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return plain and tensor.dtype in _FLOATS and tensor.numel() > 0


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
