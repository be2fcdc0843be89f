"""Polynomials with rational coefficients: exact signs and exact real roots, so that tangency is never guessed.

A polynomial is a list of ``Fraction``, constant term first; the zero polynomial is the empty list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from itertools import pairwise

Polynomial = list[Fraction]

_ROOT_BITS = 64  # relative width, in bits, to which a root is enclosed before it is rounded to a float


def trimmed(p: Sequence[Fraction]) -> Polynomial:
    """The same polynomial without leading zeros.

    Example:
        >>> trimmed([Fraction(1), Fraction(0)])
        [Fraction(1, 1)]
    """
    n = len(p)
    while n and p[n - 1] == 0:
        n -= 1
    return list(p[:n])


def add(p: Sequence[Fraction], q: Sequence[Fraction]) -> Polynomial:
    """The sum p + q."""
    n = max(len(p), len(q))
    zero = Fraction(0)
    return trimmed([(p[k] if k < len(p) else zero) + (q[k] if k < len(q) else zero) for k in range(n)])


def scale(p: Sequence[Fraction], c: Fraction) -> Polynomial:
    """The product c p with a number."""
    return trimmed([c * a for a in p])


def multiply(p: Sequence[Fraction], q: Sequence[Fraction]) -> Polynomial:
    """The product p q."""
    if not p or not q:
        return []
    out = [Fraction(0)] * (len(p) + len(q) - 1)
    for i, a in enumerate(p):
        if a:
            for j, b in enumerate(q):
                out[i + j] += a * b
    return trimmed(out)


def derivative(p: Sequence[Fraction]) -> Polynomial:
    """The derivative p'."""
    return trimmed([k * a for k, a in enumerate(p)][1:])


def evaluate(p: Sequence[Fraction], x: Fraction) -> Fraction:
    """The value p(x), exactly."""
    return reduce(lambda total, a: total * x + a, reversed(p), Fraction(0))


def divide(p: Sequence[Fraction], q: Sequence[Fraction]) -> tuple[Polynomial, Polynomial]:
    """Quotient and remainder of p by q.

    Raises:
        ZeroDivisionError: ``q`` is the zero polynomial.
    """
    if not q:
        raise ZeroDivisionError("division by the zero polynomial")
    rest, quotient = list(p), [Fraction(0)] * max(len(p) - len(q) + 1, 0)
    for k in range(len(quotient) - 1, -1, -1):
        c = rest[k + len(q) - 1] / q[-1]
        quotient[k] = c
        if c:
            for j, b in enumerate(q):
                rest[k + j] -= c * b
    return trimmed(quotient), trimmed(rest[: len(q) - 1])


def primitive(p: Sequence[Fraction]) -> list[int]:
    """A positive multiple of p with coprime integer coefficients."""
    denominator = math.lcm(*(a.denominator for a in p))
    integers = [int(a * denominator) for a in p]
    content = math.gcd(*integers) or 1
    return [a // content for a in integers]


def _negative_remainder(p: list[int], q: list[int]) -> list[int]:
    """A positive multiple of -(p mod q), with coprime integer coefficients."""
    rest, lead = list(p), q[-1]
    sign = 1 if lead > 0 else -1
    while len(rest) >= len(q):
        top = rest.pop()
        shift = len(rest) - len(q) + 1
        rest = [abs(lead) * a for a in rest]
        for j in range(len(q) - 1):
            rest[shift + j] -= sign * top * q[j]
    while rest and rest[-1] == 0:
        rest.pop()
    content = math.gcd(*rest) or 1
    return [-a // content for a in rest]


def _remainder_sequence(p: Sequence[Fraction], q: Sequence[Fraction]) -> list[list[int]]:
    chain = [primitive(p)]
    following = primitive(q) if q else []
    while following:
        chain.append(following)
        following = _negative_remainder(chain[-2], chain[-1])
    return chain


def greatest_common_divisor(p: Sequence[Fraction], q: Sequence[Fraction]) -> Polynomial:
    """The greatest common divisor of p and q, up to a factor; empty when both vanish.

    Example:
        >>> one = Fraction(1)
        >>> greatest_common_divisor([-one, 0 * one, one], [one, one])  # x^2 - 1 and x + 1
        [Fraction(1, 1), Fraction(1, 1)]
    """
    p, q = trimmed(p), trimmed(q)
    if not p or not q:
        return p or q
    if len(p) < len(q):
        p, q = q, p
    return [Fraction(a) for a in _remainder_sequence(p, q)[-1]]


def square_free_factors(p: Sequence[Fraction]) -> list[Polynomial]:
    """Yun's algorithm: factors ``f_1, f_2, ...`` with p = c f_1 f_2^2 f_3^3 ..., each without repeated roots.

    Source: D. Y. Y. Yun, "On square-free decomposition algorithms", SYMSAC 1976.
    """
    slope = derivative(p)
    common = greatest_common_divisor(p, slope)
    rest, other = divide(p, common)[0], divide(slope, common)[0]
    factors = []
    while len(rest) > 1:
        other = add(other, scale(derivative(rest), Fraction(-1)))
        factor = greatest_common_divisor(rest, other) if other else rest
        factors.append(factor)
        rest = divide(rest, factor)[0]
        other = divide(other, factor)[0] if other else []
    return factors


def square_free(p: Sequence[Fraction]) -> Polynomial:
    """A polynomial with the same roots as p, each once."""
    return divide(p, greatest_common_divisor(p, derivative(p)))[0] if len(p) > 1 else list(p)


def odd_part(p: Sequence[Fraction]) -> Polynomial:
    """A polynomial with exactly the roots of p at which p changes sign, each once."""
    return reduce(multiply, square_free_factors(p)[::2], [Fraction(1)])


def sign_near_zero(p: Sequence[Fraction]) -> int:
    """The sign of p(t) for small t > 0; 0 for the zero polynomial."""
    return next((1 if a > 0 else -1 for a in p if a), 0)


def _sign_at(p: Sequence[int], x: Fraction) -> int:
    value, power = 0, 1
    for a in reversed(p):  # Horner on the homogenised polynomial: integers only, no gcd at each step
        value = value * x.numerator + a * power
        power *= x.denominator
    return (value > 0) - (value < 0)


def _variations(signs: Sequence[int]) -> int:
    kept = [s for s in signs if s]
    return sum(a != b for a, b in pairwise(kept))


class PositiveRoots:
    """The roots t > 0 of a polynomial without repeated roots, by Sturm's theorem.

    Args:
        p: a square-free polynomial; a root at 0 is ignored.

    Example:
        >>> PositiveRoots([Fraction(6), Fraction(-5), Fraction(1)]).all()
        [Fraction(2, 1), Fraction(3, 1)]
    """

    def __init__(self, p: Sequence[Fraction]) -> None:
        self._p = trimmed(p)
        while self._p and self._p[0] == 0:
            self._p = self._p[1:]
        self._integers = primitive(self._p) if self._p else []
        self._chain: list[list[int]] = []

    def all(self) -> list[Fraction]:
        """Every positive root in increasing order, exact when it is a simple rational, else to 64 bits."""
        return self._roots(first_only=False)

    def first(self) -> Fraction | None:
        """The smallest positive root, or None when there is none."""
        return next(iter(self._roots(first_only=True)), None)

    def _roots(self, first_only: bool) -> list[Fraction]:
        if _variations([(a > 0) - (a < 0) for a in self._integers]) == 0:
            return []  # Descartes' rule of signs
        self._chain = _remainder_sequence(self._p, derivative(self._p))
        low, high = Fraction(0), self._bound()
        roots: list[Fraction] = []
        pending = [(low, high, self._count(low), self._count(high))]
        while pending:
            low, high, at_low, at_high = pending.pop()
            if at_low == at_high:
                continue
            if at_low - at_high == 1:
                roots.append(self._refined(low, high))
                if first_only:
                    return roots
                continue
            middle = (low + high) / 2
            at_middle = self._count(middle)
            pending += [(middle, high, at_middle, at_high), (low, middle, at_low, at_middle)]
        return roots

    def _count(self, x: Fraction) -> int:
        return _variations([_sign_at(q, x) for q in self._chain])

    def _bound(self) -> Fraction:
        lead = abs(self._integers[-1])
        largest = max(abs(a) for a in self._integers[:-1])
        return Fraction(2 ** max((largest // lead + 2).bit_length(), 1))

    def _refined(self, low: Fraction, high: Fraction) -> Fraction:
        """The single root in (low, high], by bisection on the sign."""
        at_high = _sign_at(self._integers, high)
        if at_high == 0:
            return high
        while high - low > high / 2**_ROOT_BITS:
            middle = (low + high) / 2
            sign = _sign_at(self._integers, middle)
            if sign == 0:
                return middle
            low, high = (low, middle) if sign == at_high else (middle, high)
        simple = ((low + high) / 2).limit_denominator(10**6)
        return simple if _sign_at(self._integers, simple) == 0 else (low + high) / 2


def interpolate(nodes: Sequence[Fraction], values: Sequence[Fraction]) -> Polynomial:
    """The polynomial of degree below ``len(nodes)`` through exact values at distinct nodes.

    Example:
        >>> interpolate([Fraction(0), Fraction(1), Fraction(2)], [Fraction(0), Fraction(1), Fraction(4)])
        [Fraction(0, 1), Fraction(0, 1), Fraction(1, 1)]
    """
    column, degree = list(values), len(nodes) - 1
    for order in range(1, degree + 1):  # Newton's divided differences, in place
        for k in range(degree, order - 1, -1):
            column[k] = (column[k] - column[k - 1]) / (nodes[k] - nodes[k - order])
    p: Polynomial = []
    for k in range(degree, -1, -1):
        p = add(multiply(p, [-nodes[k], Fraction(1)]), [column[k]])
    return p
