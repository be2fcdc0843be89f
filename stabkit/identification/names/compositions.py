"""Compositions of symplectic steps, named by their coefficients: kicks p += b_i f(q) and drifts q += a_i p in turn.

A sequence of shears is found in a tableau of two states, whichever way the code groups its operations. Its order is
that of the splitting exp(a_1 A) exp(b_1 B) ... = exp(A + B): the coefficients of every word in A and B up to a length
agree (Hairer, Lubich and Wanner 2006, III.5). Coefficients: Ruth 1983; Forest and Ruth 1990; Yoshida 1990; Suzuki 1990;
McLachlan and Atela 1992; McLachlan 1995; Omelyan, Mryglod and Folk 2002.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix
from stabkit.identification.names.single import CLOSE, Name

Shear = tuple[int, float]  # which of the two states moves (the position is 0), and by what number
_CLOSE = 1e-5  # products of two coefficients of single precision networks
_LONGEST = 6  # words that are compared: no composition in use is of a higher order
_FEWEST = 3  # an order that no step has by being symmetric


def shears(found: Blocks) -> tuple[Shear, ...] | None:
    """The kicks and drifts that a tableau of two states is made of, in order; None where it is none of such."""
    if len(found.V) != 2 or not found.fields:
        return None
    return _with_linear_drift(found) or _of_two_fields(found)


def _with_linear_drift(found: Blocks) -> tuple[Shear, ...] | None:
    """Those of q'' = f(q): the position is carried on by the velocity, and one field kicks that."""
    for q, p in ((0, 1), (1, 0)):
        V, U, whole = found.V, found.U, float(found.V[q, p])
        if found.n_fields > 1 or whole == 0.0 or not np.allclose([V[q, q], V[p, p], *U[:, q]], 1.0) or V[p, q]:
            continue
        times, kicks = U[:, p], found.B[p]
        A = np.tril((times[:, None] - times[None, :]) * kicks[None, :], -1)
        scale = _CLOSE * abs(whole) * float(np.abs(kicks).max())
        if np.allclose(found.A, A, rtol=0, atol=scale) and np.allclose(
            found.B[q], kicks * (whole - times), rtol=0, atol=scale
        ):
            moved = np.diff([0.0, *times, whole])
            pairs = zip(moved, [*kicks, 0.0], strict=True)
            return merged([shear for a, b in pairs for shear in ((0, float(a)), (1, float(b)))], CLOSE * abs(whole))
    return None


def _of_two_fields(found: Blocks) -> tuple[Shear, ...] | None:
    """Those of p' = F(q), q' = G(p): each stage reads one state as it is then, and moves the other."""
    if not np.allclose(found.V, np.eye(2)) or not np.all((found.B != 0).sum(axis=0) == 1):
        return None
    writes = [int(np.argmax(np.abs(column))) for column in found.B.T]
    A = np.array([[found.B[1 - w, j] * (j < i) for j in range(len(writes))] for i, w in enumerate(writes)])
    fits = np.allclose(found.U, np.eye(2)[[1 - w for w in writes]]) and np.allclose(found.A, A, atol=_CLOSE)
    one_each = len({*zip(writes, found.fields, strict=True)}) == len(set(writes)) == found.n_fields
    moved = [(w, float(found.B[w, j])) for j, w in enumerate(writes)]
    return merged(moved, 0.0) if fits and one_each else None


def merged(sequence: Sequence[Shear], least: float) -> tuple[Shear, ...]:
    """Neighbours that move the same state taken together, and what moves nothing left out."""
    out: list[Shear] = []
    for state, number in sequence:
        if abs(number) <= least:
            continue
        if out and out[-1][0] == state:
            out[-1] = (state, out[-1][1] + number)
        else:
            out.append((state, number))
    return tuple(out)


def name_composition(found: Blocks) -> Name | None:
    """The name of a step that is a composition of higher order, or a known one; None for others."""
    sequence = shears(found)
    told = None if sequence is None else told_of(sequence)
    if sequence is None or told is None:
        return None
    sums = [sum(number for state, number in sequence if state == i) for i in range(2)]
    if found.n_fields == 1:
        h = math.sqrt(abs(sums[0] * sums[1]))
        return Name(told, "x'' = f(x)", h, "h: h^2 is the sum of the drifts times that of the kicks", 2)
    h = math.copysign(sums[0], direction(sequence))  # the sign of a field is its own
    return Name(told, "p' = F(q), q' = G(p)", h, "h: the sum of the numbers that multiply one of the fields")


def direction(sequence: Sequence[Shear]) -> float:
    """-1 for a step back in time, all of whose drifts and kicks together are negative; else 1."""
    sums = [sum(number for state, number in sequence if state == i) for i in range(2)]
    return -1.0 if sequence and max(sums) < 0 else 1.0


def told_of(sequence: Sequence[Shear]) -> str | None:
    """What a sequence of shears is called; None below order 3, unless its coefficients are known ones."""
    if len(sequence) < 4:
        return None
    totals = {i: sum(number for state, number in sequence if state == i) for i in (0, 1)}
    if any(abs(total) <= CLOSE for total in totals.values()):
        return None
    numbers = tuple(number / totals[state] for state, number in sequence)
    known = next((name for name, theirs in _known() if _alike(numbers, theirs)), None)
    if known is not None:
        return known
    backward = all(any(number < 0 for number in numbers[i::2]) for i in range(2))
    order = order_of(numbers) if backward else 0  # no order above 2 without steps back of both (Goldman and Kaper 1996)
    if order >= _FEWEST:
        return f"symplectic composition (order {order}, {len(numbers)} kicks and drifts)"
    if len(numbers) % 2:
        return None
    half = numbers[-1] / 2  # a round that was cut between its last drift and its first
    turned = (half, *numbers[:-1], half)
    known = next((name for name, theirs in _known() if _alike(turned, theirs)), None)
    return None if known is None else f"{known}, cut in a drift or kick"


def one_step(found: Blocks) -> str | None:
    """What one kick and one drift, or three of them, are called; None for other steps.

    Trace and determinant are the same for all steps that are conjugate to one another, and say nothing of the order. A
    kick between two halves of a drift is Verlet's method as well as a drift between two halves of a kick (Hairer,
    Lubich and Wanner 2006, I.1.4 and I.1.5); parts that are no halves make a step of order 1.
    """
    sequence = shears(replace(found, fields=(0,) * len(found.fields)))
    if sequence is None or len(sequence) not in (2, 3):
        return None
    if len(sequence) == 2:
        return "symplectic Euler (position, velocity)"
    first, last = sequence[0][1], sequence[2][1]
    halves = abs(first - last) <= _CLOSE * abs(first + last)
    return "stormer_verlet" if halves else "symplectic composition (order 1, 3 kicks and drifts)"


def is_composition(name: str) -> bool:
    """Whether a name is that of a known composition."""
    return any(name.startswith(known) for known, _ in _known())


def may_be_known(sequence: Sequence[Shear]) -> bool:
    """Whether a sequence is that of a known composition but for signs, which a field that is used once hides.

    So is a leapfrog: a whole move between two halves of the other.
    """
    numbers = np.abs([number for _, number in sequence])
    if len(numbers) == 3:
        return bool(np.allclose(numbers / numbers[1], (0.5, 1.0, 0.5), atol=_CLOSE))
    if len(numbers) < 4:
        return False
    turned = np.array([numbers[-1] / 2, *numbers[:-1], numbers[-1] / 2])
    return any(_same_sizes(ours, np.abs(theirs)) for ours in (numbers, turned) for _, theirs in _known())


def _same_sizes(ours: Matrix, theirs: Matrix) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(
        np.allclose(ours[i::2] / ours[i::2].max(), theirs[i::2] / theirs[i::2].max(), atol=_CLOSE) for i in (0, 1)
    )


def _alike(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return len(ours) == len(theirs) and bool(np.allclose(ours, theirs, rtol=0, atol=_CLOSE))


@cache
def order_of(numbers: tuple[float, ...]) -> int:
    """The order of exp(c_1 A) exp(c_2 B) exp(c_3 A) ... as an approximation of exp(A + B), up to 6.

    Example:
        >>> order_of((0.5, 1.0, 0.5))
        2
    """
    series = {"": 1.0}  # coefficients of words
    for place, number in enumerate(numbers):
        letter = "AB"[place % 2]
        new: dict[str, float] = {}
        for word, coefficient in series.items():
            for power in range(_LONGEST + 1 - len(word)):
                longer = word + letter * power
                new[longer] = new.get(longer, 0.0) + coefficient * number**power / math.factorial(power)
        series = new
    for order in range(1, _LONGEST + 1):
        words = map("".join, itertools.product("AB", repeat=order))
        if any(abs(series.get(word, 0.0) - 1 / math.factorial(order)) > _CLOSE for word in words):
            return order - 1
    return _LONGEST


def _of_leapfrogs(weights: Sequence[float]) -> tuple[float, ...]:
    """Half, whole, half, one after another, with steps of these sizes."""
    numbers = [weights[0] / 2]
    for weight, after in itertools.zip_longest(weights, weights[1:], fillvalue=0.0):
        numbers += [weight, (weight + after) / 2]
    return tuple(numbers)


@cache
def _known() -> tuple[tuple[str, tuple[float, ...]], ...]:
    one = 1 / (2 - 2 ** (1 / 3))
    five = 1 / (4 - 4 ** (1 / 3))
    six = (0.784513610477560, 0.235573213359357, -1.17767998417887)
    half = 1 / math.sqrt(2)
    v = 0.1931833275037836
    xi, lam, chi = 0.1786178958448091, -0.2123418310626054, -0.06626458266981849
    return (
        ("Yoshida 4 (Forest-Ruth, three leapfrogs)", _of_leapfrogs((one, 1 - 2 * one, one))),
        ("Suzuki 4 (five leapfrogs)", _of_leapfrogs((five, five, 1 - 4 * five, five, five))),
        ("Yoshida 6 (seven leapfrogs)", _of_leapfrogs((*six, 1 - 2 * sum(six), *six[::-1]))),
        ("Ruth 3", (7 / 24, 2 / 3, 3 / 4, -2 / 3, -1 / 24, 1.0)),
        ("Ruth 3", (1.0, -1 / 24, -2 / 3, 3 / 4, 2 / 3, 7 / 24)),
        ("McLachlan-Atela 2", (1 - half, half, half, 1 - half)),
        ("McLachlan 2 (five shears)", (v, 0.5, 1 - 2 * v, 0.5, v)),
        ("Omelyan 4 (PEFRL)", (xi, 0.5 - lam, chi, lam, 1 - 2 * (chi + xi), lam, chi, 0.5 - lam, xi)),
    )
