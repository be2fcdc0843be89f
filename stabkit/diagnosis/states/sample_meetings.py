"""Where the samples of a batch meet within a model: the functions that first make one of another.

Of all samples but one another value is given, and the pass is compared with that of the batch as it is. What is that
of the one sample stays what it was; it lies at its place along some axis. A function that is given only such tensors
and returns one that has no such axis is where samples meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.training_pass import calling_line

_ROUNDING = 1e-6  # of the largest entry: what another order of additions may do
_REDUCTIONS = frozenset(
    {
        *("mean", "sum", "std", "var", "std_mean", "var_mean", "norm", "vector_norm", "linalg_norm", "max", "min"),
        *("linalg_vector_norm", "amax", "amin", "median", "logsumexp", "aminmax", "nanmean"),
    }
)
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"})
_ARITHMETIC = frozenset(
    {"sub", "add", "mul", "div", "truediv", "true_divide", "rsub", "radd", "rmul", "rtruediv", "clamp", "divide"}
)


@dataclass(frozen=True)
class Meeting:
    """One function at which samples meet.

    Attributes:
        index: its place among the functions that the pass runs.
        name: the name of the function, without underscores.
        path: the module that runs it.
        line: the line that calls it; empty where no code of the user does.
        axis: along which samples lie in what it is given.
        given: shape of what it is given.
        made: shape of what it returns.
        kind: ``"statistic"`` where it only reduces, ``"scramble"`` where it only reshapes, ``"function"`` otherwise.
    """

    index: int
    name: str
    path: str
    line: str
    axis: int
    given: tuple[int, ...]
    made: tuple[int, ...]
    kind: str


@dataclass
class Results:
    """What the functions of a pass returned, in order."""

    made: list[tuple[str, list[Tensor]]] = field(default_factory=list)


class Noting(FunctionCalls):
    """Keeps what every function returns."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if tensors := _tensors(out):
            self._results.made.append((_name(func), [t.detach().clone() for t in tensors]))
        return out


class Comparing(FunctionCalls):
    """Compares what every function returns with what it returned before all samples but one were replaced.

    Attributes:
        met: where samples meet, in order.
        joined: names of the functions that put a number made of several samples together with one sample.
        lost: whether the pass took another way than before.

    Args:
        before: what the functions returned then.
        kept: the sample that stayed.
        count: how many samples there are.
        running: says which module runs.
        held: functions that return what they returned before.
    """

    def __init__(
        self, before: Results, kept: int, count: int, running: Evaluation, held: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.met: list[Meeting] = []
        self.joined: list[str] = []
        self.lost = False
        self._before, self._kept, self._count, self._running, self._held = before, kept, count, running, held
        self._states: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self._index = -1

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _tensors([args, kwargs])
        states = [self._state(tensor) for tensor in given]
        layout = next(
            ((t.shape, sample_axis(t, self._count)) for t, s in zip(given, states, strict=True) if s == "apart"), None
        )
        out = func(*args, **kwargs)
        if self.lost or not (made := _tensors(out)):
            return out
        self._index += 1
        name = _name(func)
        if self._index >= len(self._before.made) or self._before.made[self._index][0] != name:
            self.lost = True
            return out
        before = self._before.made[self._index][1]
        if self._index in self._held:
            for tensor, old in zip(made, before, strict=True):
                tensor.copy_(old)
        found = {self._compared(one, other) for one, other in zip(made, before, strict=True)}
        state = "mixed" if "mixed" in found else "apart" if "apart" in found else "same"
        if state == "mixed":
            state = self._of_mixed(name, states, made[0], layout)
        for tensor in made:
            self._states[id(tensor)] = state
            self._alive.append(tensor)  # ids stay theirs
        return out

    def _of_mixed(self, name: str, states: Sequence[str], made: Tensor, layout: Any) -> str:
        if "statistic" in states:
            if "apart" not in states and "mixed" not in states:
                return "statistic"
            self.joined.append(name)
            return "mixed"
        if "mixed" in states:
            return "mixed"
        if "apart" not in states or layout is None:
            return "mixed"
        shape, axis = layout
        kind = "statistic" if name in _REDUCTIONS else "function"
        if name in _RESHAPES:
            if self._count not in made.shape:
                return "apart"  # folded into other axes on purpose
            kind = "scramble"
        path = self._running.recording.running
        self.met.append(Meeting(self._index, name, path, calling_line(), axis, tuple(shape), tuple(made.shape), kind))
        return "statistic" if kind == "statistic" else "mixed"

    def _state(self, tensor: Tensor) -> str:
        if id(tensor) in self._running.given:
            self._states.setdefault(id(tensor), "apart")
        return self._states.get(id(tensor), "same")

    def _compared(self, one: Tensor, other: Tensor) -> str:
        if one.shape != other.shape or one.dtype != other.dtype or one.layout != torch.strided:
            return "mixed"
        differs = differing(one, other)
        if not bool(differs.any()):
            return "same"
        return "apart" if is_apart(differs, self._kept, self._count) else "mixed"


def only_arithmetic(names: Sequence[str]) -> bool:
    """Whether functions subtract, divide and the like, as a normalisation does with mean and deviation."""
    return bool(names) and all(name.lstrip("i") in _ARITHMETIC or name in _ARITHMETIC for name in names)


def divides(names: Sequence[str]) -> bool:
    """Whether one of some functions divides.

    Example:
        >>> divides(["sub", "truediv"]), divides(["sub"])
        (True, False)
    """
    return any("div" in name for name in names)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", "")).strip("_")


def _tensors(item: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(item, 3)]


def differing(one: Tensor, other: Tensor) -> Tensor:
    """Which entries differ by more than rounding; NaN equals itself."""
    if not (one.is_floating_point() or one.is_complex()):
        return one != other
    finite = other.abs()[other.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    near = (one - other).abs() <= _ROUNDING * largest
    return ~(near | (one == other) | ((one != one) & (other != other)))


def is_apart(differs: Tensor, kept: int, count: int) -> bool:
    """Whether one sample, somewhere along an axis or along two neighbouring ones, is what it was."""
    for axis, size in enumerate(differs.shape):
        if size == count and not bool(differs.select(axis, kept).any()):
            return True
        if size > count and size % count == 0:
            rest = size // count
            before, after = differs.shape[:axis], differs.shape[axis + 1 :]
            split = differs.reshape(*before, count, rest, *after).select(axis, kept)
            minor = differs.reshape(*before, rest, count, *after).select(axis + 1, kept)
            if not bool(split.any()) or not bool(minor.any()):
                return True
        folded = size > 1 and axis + 1 < differs.dim() and size * differs.shape[axis + 1] == count
        if folded and not bool(differs.flatten(axis, axis + 1).select(axis, kept).any()):
            return True
    return False


def sample_axis(tensor: Tensor, count: int) -> int:
    """The first axis of so many entries, or of a multiple of them; -1 where there is none."""
    exact = [axis for axis, size in enumerate(tensor.shape) if size == count]
    larger = [axis for axis, size in enumerate(tensor.shape) if size and size % count == 0]
    return next(iter([*exact, *larger]), -1)
