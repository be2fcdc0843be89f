"""Nodes of a graph that get nothing: sums over neighbours of which they have none, and not themselves either.

A product with a fixed square matrix that has empty rows, or a sum over edges in which some nodes never stand at the
end: the state of such a node is a constant, whatever its features are. On trial it keeps the state that it had, as a
loop to itself would let it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.remedies.usual_training import ADAM, adams, left_after
from stabkit.diagnosis.states.sample_meetings import differing
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line

_PRODUCTS = frozenset({"matmul", "rmatmul", "mm", "spmm", "sparse_mm"})
_SCATTERS = frozenset({"index_add", "scatter_add", "scatter_reduce", "index_reduce"})
_GATHERS = frozenset({"index_select", "getitem"})
_FEWEST = 8  # nodes
_STEPS = 100  # of Adam, which learn a few dozen nodes by heart, but for those that get nothing
_BETTER = 0.8  # of what is left of the loss as it is, under which loops to themselves are worth a warning
_LARGEST = 20_000  # nodes of a matrix that is read
_HELD = 8  # gathered states that may still be added up
_REFERENCE = "Kipf and Welling, Semi-supervised classification with graph convolutional networks, 2017, section 2.2"


class _Sums(FunctionCalls):
    """Sees sums over neighbours and the nodes that get nothing from them, which on trial keep their state.

    Attributes:
        empty: of every sum, which nodes get nothing.
        place: line and module of the first of them.
    """

    def __init__(self, running: Evaluation | None = None, keeping: bool = False) -> None:
        super().__init__()
        self.empty: list[Tensor] = []
        self.place = ("", "")
        self._running, self._keeping = running, keeping
        self._read: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._gathered: list[Tensor] = []

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, out = name_of(func), func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() != 2:
            return out
        if name in _GATHERS and isinstance(args[0], Tensor) and args[0].dim() == 2 and _is_index(args[1:]):
            self._gathered = [*self._gathered[-_HELD:], args[0]]
            return out
        empty, state = self._of_product(args, out) if name in _PRODUCTS else (None, None)
        if name in _SCATTERS:
            empty, state = self._of_scatter(args, kwargs, out)
        if empty is None or not bool(empty.any()) or bool(empty.all()):
            return out
        if not self.empty:
            self.place = calling_line(), "" if self._running is None else self._running.recording.running
        self.empty.append(empty)
        if not self._keeping or state is None:
            return out
        return torch.where(empty[:, None], state, out)

    def _of_product(self, args: tuple[Any, ...], out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        given = [a for a in args if isinstance(a, Tensor) and a.dim() == 2]
        fixed = [a for a in given if not a.requires_grad and a.shape[0] == a.shape[1] == len(out)]
        if len(given) != 2 or not fixed or not _FEWEST <= len(out) <= _LARGEST or given[0].shape == given[1].shape:
            return None, None
        matrix = fixed[0]
        if id(matrix) not in self._read:
            held = matrix.detach()
            held = held if held.layout == torch.strided else held.to_dense()
            self._read[id(matrix)] = matrix, (held == 0).all(1)
        state = next(a for a in given if a is not matrix)
        return self._read[id(matrix)][1], state if state.shape == out.shape else None

    def _of_scatter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        index = kwargs.get("index", args[2] if len(args) > 2 else None)
        if not isinstance(index, Tensor) or not len(out) >= _FEWEST or kwargs.get("dim", args[1]) not in (0, -2):
            return None, None
        rows = index if index.dim() == 1 else index[:, 0] if index.dim() == 2 and index.shape[1] else None
        if rows is None:
            return None, None
        empty = torch.bincount(rows.detach(), minlength=len(out)) == 0
        states = [s for s in self._gathered if s.shape == out.shape]
        return (empty, states[-1]) if any(len(s) == len(out) for s in self._gathered) else (None, None)


def _is_index(args: Sequence[Any]) -> bool:
    flat = [each for a in args for each in (a if isinstance(a, tuple) else (a,))]
    return any(isinstance(each, Tensor) and each.dtype in (torch.int64, torch.int32) for each in flat)


def empty_node_findings(run: TrainingRun) -> list[Finding]:
    """A finding where nodes get nothing from any sum over neighbours and their output is a constant."""
    watches: list[_Sums] = []

    def watching(running: Evaluation) -> _Sums:
        watches.append(_Sums(running))
        return watches[-1]

    if run.flow.batch > 1:
        return []
    seen = evaluated(run.call, mode=watching)
    if not watches or not watches[0].empty or len({len(e) for e in watches[0].empty}) > 1:
        return []
    empty = torch.stack(watches[0].empty).any(0).cpu()
    deaf = empty & _unmoved(run, seen.output, len(empty))
    if not bool(deaf.any()):
        return []
    first = 0.0 if run.done.loss is None else float(run.done.loss.detach())
    plain = left_after(run.call, run.loss, adams(first), steps=_STEPS)
    kept = left_after(run.call, run.loss, adams(first), steps=_STEPS, within=lambda: _Sums(keeping=True))
    worth = plain is not None and kept is not None and kept < _BETTER * plain
    trial = (
        f"; tried on a copy: {_STEPS} steps of {ADAM} leave {plain:.2g} of the loss as it is, and {kept:.2g} of it "
        "where these keep the state that they had"
        if plain is not None and kept is not None
        else ""
    )
    count, (line, path) = int(deaf.sum()), watches[0].place
    where = ", ".join(filter(None, (line, path)))
    evidence = (
        f"{count} of {len(empty)} nodes get nothing from the sums over neighbours ({where})"
        f", nor from themselves: what the model returns for them does not depend on any feature" + trial
    )
    return [
        of_module(
            run.flow,
            "no_influence",
            "warning" if worth else "info",
            path,
            evidence=evidence,
            remedy="let every node be its own neighbour: add self-loops (A + I, before it is normalised), or a layer "
            "of the node's own state beside the sum; or leave nodes without neighbours out of the loss"
            if worth
            else "none is needed for these samples: it trains no better with loops from these nodes to themselves",
            reference=_REFERENCE,
            numbers={"nodes": float(count)},
        )
    ]


def _unmoved(run: TrainingRun, output: Any, count: int) -> Tensor:
    """The nodes whose outputs stay what they are where all nodes are given other features."""

    def change(tensor: Tensor) -> Tensor:
        floats = tensor.is_floating_point() and tensor.dim() == 2 and len(tensor) == count
        return tensor.flip(0) + tensor.std() if floats and tensor.shape[1] != count else tensor

    moved = evaluated(run.call, change).output
    still = torch.zeros(count, dtype=torch.bool)
    for (_, one), (_, two) in zip(named_tensors(output), named_tensors(moved), strict=False):
        if one.is_floating_point() and one.dim() and len(one) == count and one.shape == two.shape:
            still |= ~differing(two, one).reshape(count, -1).any(1).cpu()
    return still
