from fractions import Fraction
from functools import reduce

from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.integrators import rational_matrices as matrices
from stabkit.integrators import rational_polynomials as poly

ROOTS = st.lists(st.fractions(-4, 4, max_denominator=9), min_size=1, max_size=5, unique=True)


def with_roots(roots):
    return reduce(poly.multiply, [[-r, Fraction(1)] for r in roots], [Fraction(1)])


@settings(deadline=None, max_examples=60)
@given(ROOTS, st.lists(st.integers(1, 3), min_size=5, max_size=5))
def test_roots_with_multiplicities_are_found_exactly(roots, powers):
    p = with_roots([r for r, m in zip(roots, powers, strict=False) for _ in range(m)])
    assert poly.PositiveRoots(poly.square_free(p)).all() == sorted(r for r in roots if r > 0)
    odd = sorted(r for r, m in zip(roots, powers, strict=False) if m % 2 and r > 0)
    assert poly.PositiveRoots(poly.odd_part(p)).all() == odd
    assert poly.PositiveRoots(poly.odd_part(p)).first() == (odd[0] if odd else None)


def test_close_irrational_roots_are_separated():
    # (x^2 - 2)(x^2 - 2 - 1e-12): two roots 3.5e-13 apart
    p = poly.multiply([Fraction(-2), Fraction(0), Fraction(1)], [-2 - Fraction(1, 10**12), Fraction(0), Fraction(1)])
    low, high = poly.PositiveRoots(p).all()
    assert abs(low**2 - 2) < Fraction(1, 10**18)
    assert abs(high**2 - 2 - Fraction(1, 10**12)) < Fraction(1, 10**18)


@settings(deadline=None, max_examples=30)
@given(ROOTS, ROOTS)
def test_division_and_gcd(first, second):
    p, q = with_roots(first), with_roots(second)
    quotient, rest = poly.divide(p, q)
    assert poly.add(poly.multiply(quotient, q), rest) == p
    common = poly.greatest_common_divisor(p, q)
    shared = with_roots(sorted(set(first) & set(second)))
    assert poly.scale(common, 1 / common[-1]) == shared


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(-5, 5), min_size=6, max_size=6), min_size=3, max_size=3))
def test_gaussian_determinant_by_cofactors(rows):
    H = [[(row[2 * j], row[2 * j + 1]) for j in range(3)] for row in rows]
    (a, b, c), (d, e, f), (g, h, i) = [[complex(*x) for x in row] for row in H]
    expected = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    assert matrices.gaussian_determinant(H) == (round(expected.real), round(expected.imag))


def test_solution_of_a_hilbert_system_is_exact():
    hilbert = [[Fraction(1, i + j + 1) for j in range(8)] for i in range(8)]
    x = matrices.solve(hilbert, matrices.identity(8))
    assert matrices.matmul(hilbert, x) == matrices.identity(8)
