"""Windows of the last states that move by one with every step: x_{n+1} = f(x_n, ..., x_{n-k+1}), a map of order k.

Time series networks that forecast step by step shift what they know, w' = cat(w[s:], f(w)), along some axis, or in a
list. All but the newest entries of the window come from their neighbours, unchanged, whatever f is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stabkit.identification.form.coefficients import Coefficient, LinearCombination
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.grouping import is_repeated
from stabkit.identification.form.hidden_skip import affine_pulls, reached_along_affine
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import JOINS, MOVES, WRITES
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.form.slots import Slots
from stabkit.identification.form.tableau import network_of
from stabkit.identification.names.single import CLOSE
from stabkit.identification.names.step_size import NUMBER
from stabkit.identification.record import Identification, nothing
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors

_ROUNDINGS = 64.0
_VERLET = "second_order_leapfrog (Stormer-Verlet, position form)"
_FEWEST = 2  # entries along the axis of a window


@dataclass(frozen=True)
class Window:
    """A window that a step moves.

    Attributes:
        axis: along which its states lie.
        size: how many entries there are.
        by: how many are new.
        read: of how many the new ones are made.
        kept: the number times the newest entries before that the new ones are besides; 0 for none.
        before: the number times the ones before these, where every entry enters by a number; 0 for none.
    """

    axis: int
    size: int
    by: int
    read: int
    kept: float
    before: float = 0.0


def sliding_window(around: Surroundings, piece: Piece, steps: tuple[int, ...]) -> Identification | None:
    """The record of a step from one tensor to one that moves a window along an axis; None for others."""
    bends = any(operation(node) not in MOVES | {"Roll"} for node in piece.nodes)
    moves = bends and _is_put_together(piece.targets[0]) and reached_along_affine(piece) is not None
    found = _window(piece) if moves else None
    if found is None:
        return None
    order = -(-found.size // found.by)
    new = "the newest is" if found.by == 1 else f"the newest {found.by} are"
    of = f"all {found.size}" if found.read == found.size else f"{found.read} of the {found.size}"
    why = f"the entries of axis {found.axis} move up by {found.by}, and {new} made of {of}"
    if (found.by, found.kept, found.before) == (1, 2.0, -1.0):
        system = f"x'' = f(x_n, ..., x_n-{order - 1}), velocities as differences of positions"
        name = f"{_VERLET}, force of {order} positions (sliding window)"
        return nothing(steps, name, why, "measured", system=system)
    if (found.by, found.kept, found.before) == (1, 1.0, 0.0):
        return _of_newest(around.form_of(piece), found, steps, why)
    return _record(steps, order, why, found.kept if not found.before else 0.0)


def _of_newest(form: NormalForm, window: Window, steps: tuple[int, ...], why: str) -> Identification:
    """The record of x_n+1 = x_n + ..., by what is added: values of one field at the last states, or of all states."""
    added = [(atom, c) for atom, c in form.forms[0].items() if atom not in form.piece.ends]
    numbers = [c.value for _, c in added if c.kind == "scalar"]
    adams = _adams(form, window, added) if len(numbers) == len(added) > 1 else None
    if adams is None:
        return _euler_of_newest(added, window.size, window.read, steps, why)
    record = nothing(steps, f"{adams} ({_sliding(window.size)})", why, "measured", system="x' = f(x), multistep")
    return replace(record, step_size=sum(numbers), convention="h: the sum of the weights of all values of the field")


def _sliding(size: int) -> str:
    return f"sliding window of {size} states"


def _euler_of_newest(
    added: Sequence[tuple[Value, Coefficient]], size: int, read: int, steps: tuple[int, ...], why: str
) -> Identification:
    """The record of x_n+1 = x_n + h f, f of several of the last states; its h where one number multiplies it."""
    delays = (
        f", with delays: x_n+1 = x_n + f(x_n, ..., x_n-{size - 1})" if read == size else ", with delays" * (read > 1)
    )
    record = nothing(steps, f"forward Euler in the newest state ({_sliding(size)})", why, "measured",
                     system=f"x' = f(x){delays}")  # fmt: skip
    if len(added) != 1 or added[0][1].kind != "scalar":
        return record
    h = abs(added[0][1].value)
    return replace(record, step_size=h, convention=NUMBER if h != 1 else "h = 1: only the product h f can be seen")


def _adams(form: NormalForm, window: Window, added: Sequence[tuple[Value, Coefficient]]) -> str | None:
    """The name of the method of Adams and Bashforth whose weights one field has at the last states."""
    (source,), stages = form.sources, {stage.output: stage for stage in form.stages}
    weights: dict[int, float] = {}
    for atom, c in added:
        stage = stages.get(atom)
        if stage is None or len(stage.entries) != 1:
            return None
        read = LinearCombination(form.piece, stage.entries[0]).factors.get(source)
        places = [] if read is None else _places(read.reshape(meta_of(source).shape), window.axis)
        if len(places) != 1:
            return None
        weights[places[0]] = c.value
    count, keys = len(added), {network_of(stages[atom]) for atom, _ in added}
    if len(weights) < count or len(keys) > 1:
        return None
    last = max(weights) if max(weights) == window.size - 1 else 0
    lags = [abs(last - place) for place in weights]
    b = np.array([weights[place] for place in weights])
    if sorted(lags) != list(range(count)) or b.sum() <= 0:
        return None
    powers = np.array([[(-float(lag)) ** m for lag in lags] for m in range(count)])
    exact = np.linalg.solve(powers, [1 / (m + 1) for m in range(count)])
    return f"ab{count}" if np.allclose(b / b.sum(), exact, atol=CLOSE) else None


def _places(entries: Tensor, axis: int) -> list[int]:
    """Where along an axis some entries are not zero."""
    rows = entries.movedim(axis, 0).reshape(entries.shape[axis], -1)
    return rows.abs().amax(dim=1).nonzero().reshape(-1).tolist()


def window_of_states(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Identification | None:
    """The record of one of several steps that hand on all states but the oldest, and make one; None for others."""
    oldest, *kept = found.sources
    shapes = {meta_of(v).shape for v in (*found.sources, *found.targets)}
    moved = len(found.targets) == len(found.sources) and [v for v in found.targets if v in kept] == kept
    if not kept or not moved or oldest in found.targets or len(shapes) > 1:
        return None
    if not is_repeated(around.flow, steps[0], steps[-1] + 1):
        return None  # of one step alone nothing says that the states are one, at times one after the other
    form = around.normal_form(steps[0], steps[-1] + 1, found)
    new = next(i for i, target in enumerate(form.targets) if target not in kept)
    terms, count = form.forms[new], len(found.sources)
    why = f"{len(kept)} of {len(found.sources)} states move up, and the newest is made of all"
    old = {atom: c for atom, c in terms.items() if atom in form.piece.ends}
    if old.keys() == {kept[-1]} and old[kept[-1]].kind == "scalar" and old[kept[-1]].value == 1.0:
        added = [(atom, c) for atom, c in terms.items() if atom not in old]
        return _euler_of_newest(added, count, count, steps, why)
    return _record(steps, count, why, 0.0)


def _record(steps: tuple[int, ...], order: int, why: str, kept: float) -> Identification:
    by = "sliding window" if not kept else f"sliding window, a = {kept:.3g}"
    state = "" if not kept else f"{'' if kept == 1.0 else f'{kept:.3g} '}x_n + "
    system = f"x_n+1 = {state}f(x_n, ..., x_n-{order - 1}), a difference equation with delays"
    return nothing(steps, f"autoregressive map of order {order} ({by})", why, "measured", system=system)


def _is_put_together(value: Value) -> bool:
    """Whether a tensor was joined of others, or written into, and at most laid out anew since."""
    node = value.node
    while operation(node) not in JOINS | WRITES | {"Roll"}:
        parent = node.next_functions[0][0] if node.next_functions else None
        if operation(node) not in MOVES or parent is None:
            return False
        node = parent
    return True


def _window(piece: Piece) -> Window | None:
    source, target = piece.sources[0], piece.targets[0]
    shape = tuple(meta_of(target).shape)
    if tuple(meta_of(source).shape) != shape:
        return None
    w = random_tensors([target], seed=0)[0]
    for axis, size in enumerate(shape):
        for turned in (False, True):
            by = _moves_by(piece, w, axis, turned=turned) if size >= _FEWEST else None
            read = None if by is None else _moved(piece, w, axis, by, turned=turned)
            if by is not None and read is not None:
                return Window(axis, size, by, read, *_kept(piece, w, axis, by, turned=turned))
    return None


def _kept(piece: Piece, w: Tensor, axis: int, by: int, *, turned: bool) -> tuple[float, float]:
    """The numbers by which the newest entries before, and those before them, enter the new ones by affine operations.

    0 and 0 where others enter as well, or by no number.
    """
    size = w.shape[axis]
    newest, earlier = (0, by) if turned else (size - by, size - 2 * by)
    given = torch.zeros_like(w)
    given.narrow(axis, newest, by).copy_(w.narrow(axis, newest, by))
    arrived = affine_pulls(piece, [given])
    if arrived is None or by * 2 > size:
        return 0.0, 0.0
    new = w.narrow(axis, newest, by)
    numbers = [
        float((arrived[0].narrow(axis, place, by) * new).sum() / (new * new).sum()) for place in (newest, earlier)
    ]
    slack = _ROUNDINGS * torch.finfo(w.dtype).eps
    kept, before = (float(round(n)) if abs(n - round(n)) <= slack else n for n in numbers)
    given.narrow(axis, newest, by).mul_(kept)
    given.narrow(axis, earlier, by).copy_(before * new)
    away = float((arrived[0] - given).abs().max())
    return (kept, before) if away <= slack * float(w.abs().max()) else (0.0, 0.0)


def _moves_by(piece: Piece, w: Tensor, axis: int, *, turned: bool) -> int | None:
    """By how many places the oldest entry along an axis was moved there; None where it is no entry of the window."""
    size = w.shape[axis]
    place = size - 1 if turned else 0
    one = torch.zeros_like(w)
    one.select(axis, place).copy_(w.select(axis, place))
    arrived = _pulled(piece, one)
    if arrived is None:
        return None
    reached = _places(arrived, axis)
    return abs(reached[0] - place) or None if len(reached) == 1 else None


def _moved(piece: Piece, w: Tensor, axis: int, by: int, *, turned: bool) -> int | None:
    """Of how many entries the newest are made, where all others come from their neighbours; None elsewhere."""
    kept = w.shape[axis] - by
    old, new = (0, by) if turned else (by, 0)
    given, expected = torch.zeros_like(w), torch.zeros_like(w)
    given.narrow(axis, new, kept).copy_(w.narrow(axis, new, kept))
    expected.narrow(axis, old, kept).copy_(w.narrow(axis, new, kept))
    arrived, rest = _pulled(piece, given), _pulled(piece, w - given)
    if arrived is None or rest is None or not bool(rest.any()):
        return None
    slack = _ROUNDINGS * torch.finfo(w.dtype).eps * float(w.abs().max())
    return len(_places(rest, axis)) if float((arrived - expected).abs().max()) <= slack else None


def _pulled(piece: Piece, w: Tensor) -> Tensor | None:
    edges = {node: piece.inputs(node) for node in piece.nodes}
    return pull(piece.graph, piece.nodes, edges, {piece.targets[0]: w}).get(piece.sources[0])
