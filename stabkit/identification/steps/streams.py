"""Several residual streams along one axis of a state, mixed by a matrix (hyper-connections): a general linear method.

    y = f(sum_j a_j x_j),    x'_i = sum_j M_ij x_j + b_i y,

the streams x_1, ..., x_n lying side by side in one tensor. M, a and b are measured with a few products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabkit.identification.form.chain import Link, joined
from stabkit.identification.form.hidden_skip import affine_pulls
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.names.single import Name
from stabkit.identification.record import Identification, record_of
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import meta_of, random_tensors

_ROUNDINGS = 256.0
MOST_STREAMS = 16  # along an axis: hyper-connections have 2 to 8
Matrix = npt.NDArray[np.float64]
Pull = Callable[[Sequence[Tensor]], list[Tensor]]  # cotangents of a step's target to its source


@dataclass(frozen=True)
class Streams:
    """A method of several streams.

    Attributes:
        method: with M as its V, a as its U and b as its B.
        axis: the axis of the state along which the streams lie.
        residual: relative deviation of the step from it.
        parts: the methods that make it up, one after the other; empty where it is one.
    """

    method: GeneralLinearMethod
    axis: int
    residual: float
    parts: tuple[GeneralLinearMethod, ...] = ()


def mixed_streams(piece: Piece) -> Streams | None:
    """The method of a step whose skip mixes streams along one axis; None where it is no such step."""
    source, target = piece.sources[0], piece.targets[0]
    shape = meta_of(target).shape
    if meta_of(source).shape != shape:
        return None
    edges = {node: piece.inputs(node) for node in piece.nodes}

    def vjp(cotangents: Sequence[Tensor]) -> list[Tensor]:
        arrived = pull(piece.graph, piece.nodes, edges, {target: cotangents[0]})
        return [arrived[source] if source in arrived else torch.zeros_like(cotangents[0])]

    tolerance = _ROUNDINGS * torch.finfo(meta_of(target).dtype).eps
    w = random_tensors([target], seed=0)[0]
    skip = affine_pulls(piece, [w])
    if skip is None:
        return None
    for layout in _layouts(tuple(shape)):
        n = layout.view[layout.axis]
        if w.numel() < 2 * n * n:
            continue
        W, S = layout.rows(w), layout.rows(skip[0])
        M = S @ np.linalg.pinv(W)  # S = M^T W
        if np.linalg.norm(S - M @ W) > tolerance * np.linalg.norm(S):
            continue
        found = _branch(w, vjp, M, layout, tolerance)
        if found is not None:
            a, b, residual = found
            method = GeneralLinearMethod(np.zeros((1, 1)), a[None], b[:, None], M.T, name=f"{n} streams")
            return Streams(method, layout.of, residual)
    return None


def streams_in_turn(graph: Graph, links: Sequence[Link]) -> Streams | None:
    """The method of several branches one after the other, each of streams that a matrix mixes; None for others.

    Between two of them the entries may be laid out in several ways: the one in which the step begins is taken.
    """
    maps = [i for i, link in enumerate(links) if link.kind == "map"]
    if len(maps) < 2 or any(link.kind not in ("map", "scaling") for link in links):
        return None
    shape = meta_of(links[0].form.sources[0]).shape
    found: list[Streams] = []
    start = 0
    for i, following in zip(maps, [*maps[1:], None], strict=True):
        stops = range(i + 1, following + 1) if following is not None else [len(links)]
        alike = [stop for stop in stops if meta_of(links[stop - 1].form.targets[0]).shape == shape]
        pieces = [(stop, mixed_streams(joined(graph, links[start:stop]))) for stop in alike[-1:]]
        if not pieces or pieces[0][1] is None:
            return None
        start, one = pieces[0][0], pieces[0][1]
        found.append(one)
    if len({(one.axis, one.method.states) for one in found}) > 1:
        return None
    method = found[0].method
    for one in found[1:]:
        method = _then(method, one.method)
    return Streams(method, found[0].axis, max(one.residual for one in found), tuple(one.method for one in found))


def _then(first: GeneralLinearMethod, second: GeneralLinearMethod) -> GeneralLinearMethod:
    """One method of several states followed by another, whose fields are others."""
    A, U, B, V = first.A, first.U, first.B, first.V
    more = np.block([[A, np.zeros((len(A), len(second.A)))], [second.U @ B, second.A]])
    fields = tuple(range(len(more)))
    return GeneralLinearMethod(more, np.vstack([U, second.U @ V]), np.hstack([second.V @ B, second.B]), second.V @ V,
                               fields=fields, name=first.name)  # fmt: skip


def numbers_of(method: GeneralLinearMethod) -> str:
    """The blocks of a method of one field as its note gives them, rows apart by semicolons."""
    V, a, b = ("; ".join(", ".join(f"{x:.3g}" for x in row) for row in np.asarray(m)) for m in (
        method.V, method.U, np.asarray(method.B).T))  # fmt: skip
    return f"V = ({V}), the field is that of a = ({a}), and is added with b = ({b})"


def record_of_streams(streams: Streams, steps: tuple[int, ...]) -> Identification:
    """The record of residual streams that a matrix mixes."""
    n = streams.method.states
    name = f"{f'{len(streams.parts)} times ' if streams.parts else ''}general linear method of {n} streams"
    why = f"the skip mixes {n} streams along axis {streams.axis} by a matrix, the V of a general linear method"
    one = "h = 1: only the product h f can be seen"
    named = Name(name, "x' = f(x), a history of states as streams", 1.0, one)
    notes = (why, *map(numbers_of, streams.parts or (streams.method,)))
    record = record_of(named, None, steps, skip=None, residual=streams.residual, notes=notes)
    return replace(record, method=streams.method, evidence="measured")


def mixed_by_numbers(record: Identification) -> Identification:
    """A record of several states without a name, that of one field of them all as the general linear method it is."""
    method, name = record.method, record.name
    if not isinstance(method, GeneralLinearMethod) or method.stages != 1 or method.states < 2:
        return record
    known = f"general linear method of {method.states} states"
    if name not in ("unnamed", known) or not np.any(method.U) or not np.any(method.B):
        return record
    system = record.system if name == known else "x' = f(x), several states"
    return replace(record, name=known, system=system, notes=(numbers_of(method), *record.notes))


@dataclass(frozen=True)
class _Layout:
    """One way in which streams may lie in a state.

    Attributes:
        of: the axis of the state that holds them, maybe folded with another.
        view: the shape with that axis unfolded.
        axis: the axis of the streams in it.
    """

    of: int
    view: tuple[int, ...]
    axis: int

    def unfold(self, tensor: Tensor) -> Tensor:
        """Streams along an axis of their own, which comes first."""
        return tensor.reshape(self.view).movedim(self.axis, 0)

    def rows(self, tensor: Tensor) -> Matrix:
        """One row a stream."""
        return np.asarray(self.unfold(tensor.detach().double().cpu()).flatten(1).numpy())


def _layouts(shape: tuple[int, ...]) -> Iterator[_Layout]:
    """Streams as a whole axis, but for the one of samples; then folded into an axis, the slower or the faster part."""
    for axis, size in enumerate(shape[1:], 1):
        if 2 <= size <= MOST_STREAMS:
            yield _Layout(axis, shape, axis)
    for axis, size in enumerate(shape):
        for n in range(2, min(size - 1, MOST_STREAMS) + 1):
            if size % n == 0:
                before, after = shape[:axis], shape[axis + 1 :]
                yield _Layout(axis, (*before, size // n, n, *after), axis + 1)
                yield _Layout(axis, (*before, n, size // n, *after), axis)


def _branch(w: Tensor, vjp: Pull, M: Matrix, layout: _Layout, tolerance: float) -> tuple[Matrix, Matrix, float] | None:
    """What the streams give to the one field, and what they take of it, both up to a factor of the field's own."""
    n = len(M)
    v = layout.unfold(w)[0]
    pulled = []
    for i in range(n):
        one = torch.zeros_like(w)
        layout.unfold(one)[i].copy_(v)
        pulled.append(layout.rows(vjp([one])[0]) - M @ layout.rows(one))
    flat = np.stack([p.ravel() for p in pulled])  # b_i (a x g)
    if not np.isfinite(flat).all():
        return None
    left, sizes, right = np.linalg.svd(flat, full_matrices=False)
    if sizes[0] == 0 or sizes[1] > 100 * tolerance * np.linalg.norm(w.double().cpu().numpy()):
        return None
    b = left[:, 0]
    inner = right[0].reshape(n, -1)
    reads, weights, _ = np.linalg.svd(inner, full_matrices=False)
    if weights[1] > 1e3 * tolerance * weights[0]:
        return None
    a, b = (x / x[np.abs(x).argmax()] for x in (reads[:, 0], b))
    return a, b, float(max(sizes[1] / sizes[0], weights[1] / weights[0]))
