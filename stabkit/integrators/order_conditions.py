"""The order of a general linear method, from the order conditions on rooted trees.

A starting method with elementary weights xi is sought such that one step after it equals the exact flow followed by
it, tree by tree: xi E = B (eta D) + V xi with eta = A (eta D) + U xi. Sources: J. C. Butcher, Numerical Methods for
Ordinary Differential Equations, 3rd ed. 2016, sections 38 (trees, composition) and 53 (order of general linear
methods); A. L. Araujo, A. Murua, J. M. Sanz-Serna, SIAM J. Numer. Anal. 34 (1997) (trees coloured by field).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

from stabkit.integrators.characteristic import Characteristic

FloatArray = npt.NDArray[np.float64]

#: A rooted tree: the field at its root, and its subtrees.
Tree = tuple[int, tuple["Tree", ...]]

_HIGHEST = 20


def linear_order(p: Characteristic, *, tolerance: float = 1e-12) -> int:
    """The order on linear problems y' = lambda y: the principal root is exp(z) + O(z^(q+1)).

    p(exp(z), z) = O(z^(q+m)) where 1 is an m-fold root of p(., 0) (m = 2 for pairs of states that oscillate).

    Args:
        p: the characteristic polynomial.
        tolerance: relative to the terms of the series.

    Example:
        >>> linear_order(Characteristic(((Fraction(-1), Fraction(-1)), (Fraction(1),))))  # 1 + z
        1
    """
    rows = p.rows
    multiplicity = _multiplicity_of_one([row[0] if row else Fraction(0) for row in rows], tolerance)
    if multiplicity == 0:
        return 0
    for m in range(_HIGHEST + 2):
        terms = [
            c * Fraction(k ** (m - j), math.factorial(m - j))
            for k, row in enumerate(rows)
            for j, c in enumerate(row)
            if j <= m
        ]
        if abs(sum(terms, Fraction(0))) > tolerance * sum(map(abs, terms), Fraction(0)):
            return max(m - multiplicity, 0)
    return _HIGHEST


def _multiplicity_of_one(rho: list[Fraction], tolerance: float) -> int:
    """How often zeta = 1 is a root of the polynomial rho."""
    for m in range(len(rho)):
        terms = [c * math.comb(k, m) for k, c in enumerate(rho)]  # the m-th derivative at 1 over m!
        if abs(sum(terms, Fraction(0))) > tolerance * sum(map(abs, terms), Fraction(0)):
            return m
    return 0


def order(
    tableau: Sequence[FloatArray], fields: Sequence[int], *, at_most: int, tolerance: float = 1e-10
) -> int | None:
    """The order of consistency for nonlinear problems.

    Args:
        tableau: A, U, B, V as float arrays.
        fields: the field of each stage; several fields mean y' = f_0(y) + f_1(y) + ...
        at_most: an upper bound, such as the order on linear problems.
        tolerance: on the residual of an order condition.

    Returns:
        The order, 0 when the method is not consistent, or None when the states do not all approximate the same
        solution (partitioned systems), for which these conditions do not apply.
    """
    A, U, B, V = tableau
    r = len(V)
    null = np.linalg.matrix_rank(np.eye(r) - V, tol=1e-9)
    start = _preconsistency(U, V)
    if start is None:
        return 0
    if null < r - 1 or abs(start[0]) < 1e-9:
        return None
    colours = sorted(set(fields))
    member = {c: np.array([f == c for f in fields], dtype=float) for c in colours}
    xi: dict[Tree, FloatArray] = {}
    eta: dict[Tree, FloatArray] = {}
    for size in range(1, at_most + 1):
        for tree in trees(size, tuple(colours)):
            slopes = member[tree[0]] * math.prod((eta[child] for child in tree[1]), start=np.ones(len(A)))
            flow = _flow_then(tree, xi, start)
            weight = _solve_stationary(V, B @ slopes - flow, start)
            if np.abs(weight - V @ weight - (B @ slopes - flow)).max() > tolerance:
                return size - 1
            xi[tree] = weight
            eta[tree] = A @ slopes + U @ weight
    return at_most


@cache
def trees(size: int, colours: tuple[int, ...] = (0,)) -> tuple[Tree, ...]:
    """All rooted trees with this many vertices, each vertex in one of the colours.

    Example:
        >>> [len(trees(n)) for n in range(1, 9)]
        [1, 1, 2, 4, 9, 20, 48, 115]
    """
    return tuple((colour, forest) for forest in _forests(size - 1, size - 1, colours) for colour in colours)


def _forests(size: int, largest: int, colours: tuple[int, ...]) -> Iterator[tuple[Tree, ...]]:
    """Multisets of trees with ``size`` vertices in all and at most ``largest`` in each."""
    if size == 0:
        yield ()
        return
    for biggest in range(min(size, largest), 0, -1):
        for count in range(1, size // biggest + 1):
            for chosen in itertools.combinations_with_replacement(trees(biggest, colours), count):
                for rest in _forests(size - count * biggest, biggest - 1, colours):
                    yield chosen + rest


@cache
def vertices(tree: Tree) -> int:
    """The number of vertices of a tree."""
    return 1 + sum(vertices(child) for child in tree[1])


@cache
def density(tree: Tree) -> int:
    """Butcher's density gamma: the exact flow has elementary weight 1 / gamma."""
    return vertices(tree) * math.prod(density(child) for child in tree[1])


@cache
def prunings(tree: Tree) -> tuple[tuple[tuple[Tree, ...], Tree | None], ...]:
    """All ways to cut a forest off the tree: pairs (forest, what remains at the root or None)."""
    out: list[tuple[tuple[Tree, ...], Tree | None]] = [((tree,), None)]
    for choice in itertools.product(*(prunings(child) for child in tree[1])):
        cut = tuple(itertools.chain.from_iterable(forest for forest, _ in choice))
        kept = sorted((rest for _, rest in choice if rest is not None), key=_canonical)
        out.append((cut, (tree[0], tuple(kept))))
    return tuple(out)


def _canonical(tree: Tree) -> tuple[int, int]:
    """The place of a tree in the enumeration, so that a remaining trunk is spelled as the enumeration spells it."""
    colours = tuple(sorted(_colours(tree)))
    return -vertices(tree), trees(vertices(tree), colours).index(tree)


def _colours(tree: Tree) -> set[int]:
    return {tree[0]}.union(*(_colours(child) for child in tree[1]))


def _preconsistency(U: FloatArray, V: FloatArray) -> FloatArray | None:
    """The vector u with V u = u and U u = 1: what the states hold for a constant solution."""
    system = np.vstack([V - np.eye(len(V)), U])
    target = np.concatenate([np.zeros(len(V)), np.ones(len(U))])
    u = np.linalg.lstsq(system, target, rcond=None)[0]
    return u if np.abs(system @ u - target).max(initial=0.0) < 1e-9 else None


def _flow_then(tree: Tree, xi: dict[Tree, FloatArray], start: FloatArray) -> FloatArray:
    """(xi E)(tree) without its term xi(tree): the exact flow over one step, then the starting method."""
    if len(start) == 1:
        return start / density(tree)  # one state: xi vanishes on every tree
    total = np.zeros(len(start))
    for forest, trunk in prunings(tree):
        if forest:
            total = total + (start if trunk is None else xi[trunk]) / math.prod(map(density, forest))
    return total


def _solve_stationary(V: FloatArray, right: FloatArray, start: FloatArray) -> FloatArray:
    """A least-squares solution of (I - V) x = right with first component 0."""
    if len(V) == 1:
        return np.zeros(1)
    x = np.linalg.lstsq(np.eye(len(V)) - V, right, rcond=1e-9)[0]
    return np.asarray(x - x[0] / start[0] * start, dtype=float)
