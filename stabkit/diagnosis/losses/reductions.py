"""How each summand of a loss is reduced: over which entries it is a sum, and over which a mean.

That is read off the graph of the loss, from the scalar down to the entries: functions that sum or average, losses that
do so themselves, and divisions by the number of what was summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabkit.diagnosis.losses.terms import MATRICES
from stabkit.tracing.graph.values import Value, meta_of, operation, value_of
from stabkit.tracing.recording.training_pass import nodes_from
from stabkit.vocabulary import moves

_MOVES = moves("reshape", "permute", "copy")
_POINTWISE = ("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits")
_BY_LABEL = ("NllLoss", "NllLoss2D")
_MEAN, _SUM = 1, 2  # reductions of the losses of torch
_MOST = 16  # summands that are told apart
_EXACT = 1e-5  # within which a constant is a number of entries


@dataclass(frozen=True)
class Summand:
    """A summand of a loss.

    Attributes:
        value: what is added, on the graph: one number, or one for each row.
        coefficient: what is added of it counts in the loss, without its sign.
        shape: of the entries that it reduces, rows (samples) first.
        of_rows: ``"sum"`` or ``"mean"``, over the rows.
        summed: entries of a row that are summed.
        averaged: entries of a row that are averaged.
    """

    value: Value
    coefficient: float
    shape: tuple[int, ...]
    of_rows: str
    summed: float
    averaged: float

    @property
    def words(self) -> str:
        """How it is reduced."""
        across = f"{'summed' if self.of_rows == 'sum' else 'averaged'} over {self.shape[0]} rows"
        inner = [f"the sum over {self.summed:.0f}"] * (self.summed > 1)
        inner += [f"the mean over {self.averaged:.0f}"] * (self.averaged > 1)
        return f"{across}, of each {' and '.join(inner)} entries" if inner else across


def summands_of(loss: Tensor) -> list[Summand]:
    """The summands of a loss whose reductions can be read."""
    found: list[Summand] = []
    whole = value_of(loss)
    stack: list[tuple[Value, Value, tuple[_Reduction, ...], int]] = [(whole, whole, (), 0)]
    while stack and len(found) < _MOST:
        value, added, ways, below = stack.pop()
        parents = parents_of(value)
        one = _reduction(value, parents)
        if operation(value.node) in ("Add", "Sub", "Rsub") and len(parents) == 2 and _are_flat([value, *parents]):
            stack += [(parent, parent, ways, len(ways)) for parent in parents[::-1]]
        elif one is not None and one.kind != "loss" and _are_flat(parents):
            stack.append((parents[0], added, (*ways, one), below))
        else:
            found += _read(value, added, ways, below)
    return found


def of_matrices(summand: Summand) -> bool:
    """Whether a matrix has a part in a summand; it has none in a penalty on weights themselves."""
    return any(operation(node) in MATRICES for node in nodes_from(summand.value.node))


def _are_flat(values: list[Value]) -> bool:
    """Whether these are numbers, or one for each row."""
    return all(len(meta_of(value).shape) < 2 for value in values)


@dataclass(frozen=True)
class _Reduction:
    """One operation on the way from the loss to the entries.

    Attributes:
        kind: ``"reduce"``, ``"loss"`` (which reduces as well), ``"factor"`` or ``"move"``.
        given: shape of what it is given.
        made: shape of what it makes.
        mean: whether it averages, where it reduces.
        factor: what it multiplies by.
    """

    kind: str
    given: tuple[int, ...] = ()
    made: tuple[int, ...] = ()
    mean: bool = False
    factor: float = 1.0

    @property
    def counts(self) -> bool:
        """Whether it reduces entries."""
        return bool(self.given)

    @property
    def coefficient(self) -> float:
        """What an entry counts in what it makes."""
        if self.mean:
            return math.prod(self.made) / math.prod(self.given)
        return abs(self.factor)


def parents_of(value: Value) -> list[Value]:
    """The variables that an operation was given."""
    return [Value(parent, number) for parent, number in value.node.next_functions if parent is not None]


def _reduction(value: Value, parents: list[Value]) -> _Reduction | None:
    """What an operation is on the way down, a loss of its own right included; None where entries begin behind it."""
    node: Any = value.node
    name = operation(node)
    if name in (*_POINTWISE, *_BY_LABEL) and node._saved_reduction in (_MEAN, _SUM):
        entries = node._saved_target if name in _BY_LABEL else node._saved_self
        return _Reduction("loss", tuple(entries.shape), (), node._saved_reduction == _MEAN) if entries.dim() else None
    if len(parents) != 1:
        return None
    given, made = tuple(meta_of(parents[0]).shape), tuple(meta_of(value).shape)
    if name in ("Sum", "Mean"):
        return _Reduction("reduce", given, made, name == "Mean") if given else None
    if name == "Neg" or name in _MOVES:
        return _Reduction("move")
    if name in ("Mul", "Div"):
        constant = _constant(node)
        return None if constant is None else _Reduction("factor", factor=constant if name == "Mul" else 1 / constant)
    return None


def _constant(node: Any) -> float | None:
    """The number that multiplies a variable or divides it; None for anything else."""
    if node.next_functions[0][0] is None:  # a constant over a variable, or times it
        saved = node._saved_self if operation(node) == "Mul" else None
    else:
        saved = getattr(node, "_saved_other", None)
    if isinstance(saved, Tensor):
        saved = float(saved.detach()) if saved.numel() == 1 else None
    return float(saved) if isinstance(saved, int | float) and saved and math.isfinite(saved) else None


def _read(value: Value, added: Value, above: tuple[_Reduction, ...], below: int) -> list[Summand]:
    """A summand with all reductions down to its entries; empty where it has no rows.

    Args:
        value: down to where it was followed.
        added: what is added.
        above: what was passed on the way down to the value.
        below: how much of that lies above what is added.
    """
    ways, here, shape = list(above), value, tuple(meta_of(value).shape)
    while True:
        parents = parents_of(here)
        one = _reduction(here, parents)
        if one is None:
            break
        ways.append(one)
        if one.kind == "loss":
            shape = one.given
            break
        here = parents[0]
        shape = tuple(meta_of(here).shape)
    if not shape or shape[0] < 2:
        return []
    of_rows, summed, averaged = "", 1.0, 1.0
    for way in (way for way in ways if way.counts):
        count = math.prod(way.given) / max(math.prod(way.made), 1)
        if not way.made or way.made[0] != way.given[0]:
            of_rows = of_rows or ("mean" if way.mean else "sum")
            count /= way.given[0]
        summed, averaged = (summed, averaged * count) if way.mean else (summed * count, averaged)
    if not of_rows:
        return []
    for way in ways:
        if way.kind == "factor":
            of_rows, summed, averaged = _divided(1 / abs(way.factor), shape[0], of_rows, summed, averaged)
    coefficient = math.prod(way.coefficient for way in ways[:below])
    return [Summand(added, coefficient, shape, of_rows, summed, averaged)]


def _divided(by: float, rows: int, of_rows: str, summed: float, averaged: float) -> tuple[str, float, float]:
    """Reductions of what is divided by a constant, which may be the number of what was summed."""
    if of_rows == "sum" and summed > 1 and _is(by, rows * summed):
        return "mean", 1.0, averaged * summed
    if of_rows == "sum" and _is(by, rows):
        return "mean", summed, averaged
    if summed > 1 and _is(by, summed):
        return of_rows, 1.0, averaged * summed
    return of_rows, summed, averaged


def _is(number: float, count: float) -> bool:
    return abs(number - count) <= _EXACT * count
