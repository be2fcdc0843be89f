"""The method of a map that is applied again and again, such as a recurrent network over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.reading import read
from stabkit.identification.record import Identification
from stabkit.identification.steps.pairs import PARTS
from stabkit.tracing import Iteration, trace

_MOST = 64  # readings of a map whose coefficients change with the state


def read_iteration(flow: Iteration, checks: bool = True) -> tuple[Identification, ...]:
    """One record per step of an iterated map.

    The map is the same at every step, so what its code proves is read once. Coefficients that depend on the state (the
    gates of a GRU) are read at every step, or at 64 of them, spread evenly; the others then show those of the nearest.
    """
    first = _read_step(flow, 0, checks)
    if first.evidence == "proven" or first.method is None:
        return tuple(replace(first, steps=(index,)) for index in range(flow.n_steps))
    count = min(flow.n_steps, _MOST)
    places = sorted({round(i * (flow.n_steps - 1) / max(1, count - 1)) for i in range(count)})
    found = {place: _read_step(flow, place, checks) for place in places}
    records = []
    for index in range(flow.n_steps):
        near = min(places, key=lambda place: abs(place - index))
        notes = () if near == index else (f"coefficients as they are at step {near}",)
        records.append(replace(found[near], steps=(index,), notes=(*notes, *found[near].notes)))
    return tuple(records)


def _read_step(flow: Iteration, index: int, checks: bool) -> Identification:
    """The method of one step, traced by itself. A trace starts from one tensor, so several are joined to one."""
    function, state = flow.function, flow.states[index].tensors
    drive = tuple(part[index] for part in flow.inputs)
    axis = function.axes[0]
    if len(state) == 1:
        given, joined = state[0], _Joined((), ())
    else:
        joined = _Joined(tuple(tensor.shape for tensor in state), function.axes)
        given, axis = joined.join(state), None if axis is None else 0

    def step(x: Tensor, module: nn.Module = flow.model) -> Tensor:
        after = function.apply(joined.part(x), drive)
        return joined.join(after)

    traced = trace(step, given, batch_dim=axis, check=False)
    record = read(Surroundings(traced, checks), 0, len(traced.steps))
    return replace(record, steps=(index,), notes=tuple(n.removesuffix(PARTS) for n in record.notes))


@dataclass(frozen=True)
class _Joined:
    """Several state tensors as rows of one, a sample each; nothing to join when there are no shapes.

    Attributes:
        shapes: the shapes of the tensors.
        axes: which dimension of each counts samples; None when the whole batch is one state.
    """

    shapes: tuple[torch.Size, ...]
    axes: tuple[int | None, ...]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor, ``(batch, all entries of a sample)``."""
        if not self.shapes:
            return tensors[0]
        rows = zip(tensors, self.axes, strict=True)
        return torch.cat([t.reshape(1, -1) if a is None else t.movedim(a, 0).flatten(1) for t, a in rows], dim=1)

    def part(self, joined: Tensor) -> tuple[Tensor, ...]:
        """The tensors again."""
        if not self.shapes:
            return (joined,)
        sizes = [shape.numel() // len(joined) for shape in self.shapes]
        parts = torch.split(joined, sizes, dim=1)
        return tuple(map(_restored, parts, self.shapes, self.axes))


def _restored(rows: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    if axis is None:
        return rows.reshape(shape)
    inner = [size for i, size in enumerate(shape) if i != axis]
    return rows.reshape(shape[axis], *inner).movedim(0, axis)
