"""General linear methods from the forms in which methods are published."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators.general_linear import GeneralLinearMethod, Tableau, from_tableau
from stabkit.integrators.rational_matrices import Matrix, identity, matmul, solve
from stabkit.integrators.tableau_checks import entries_are_exact, to_fraction

_ZERO, _ONE = Fraction(0), Fraction(1)


@accepts
def from_butcher(
    A: Sequence[Sequence[Any]], b: Sequence[Any], *, name: str = "", source: str = "", **options: Any
) -> GeneralLinearMethod:
    """A Runge-Kutta method from its Butcher tableau.

    Args:
        A: ``(s, s)``; rows of an explicit method may stop before the diagonal.
        b: ``(s,)``, the weights.
        name: shown in results.
        source: where the coefficients are from.
        **options: passed to :class:`GeneralLinearMethod`.

    Raises:
        ArgumentError: the shapes do not fit.

    Example:
        >>> from_butcher([[], ["1/2"]], [0, 1], name="midpoint").order
        2
    """
    s = len(b)
    if len(A) != s or any(len(row) > s for row in A):
        raise ArgumentError(
            f"A has rows of length {[len(row) for row in A]} for {s} weights b; expected {s} rows of at most {s}"
        )
    full = [[*row, *([0] * (s - len(row)))] for row in A]
    return GeneralLinearMethod(full, [[1]] * s, [list(b)], [[1]], name=name, source=source, **options)


@accepts
def from_shu_osher(
    alpha: Sequence[Sequence[Any]], beta: Sequence[Sequence[Any]], *, name: str = "", source: str = ""
) -> GeneralLinearMethod:
    """A Runge-Kutta method from its Shu-Osher form.

    With rows i = 1, ..., s: y_i = v_i y_0 + sum_j (alpha_ij y_j + h beta_ij f(y_j)), v_i = 1 - sum_j alpha_ij, and the
    last row gives the result. Source: S. Gottlieb, D. Ketcheson, C.-W. Shu, Strong Stability Preserving Runge-Kutta
    and Multistep Time Discretizations, 2011, chapter 3.

    Args:
        alpha: ``(s, s)`` with rows y_1 ... y_s and columns y_0 ... y_{s-1}, or ``(s + 1, s)`` with rows and columns
            starting at the first stage (then implicit forms are possible too).
        beta: the same shape.
        name: shown in results.
        source: where the coefficients are from.

    Raises:
        ArgumentError: the shapes do not fit.

    Example:
        >>> ssp22 = from_shu_osher([[1, 0], ["1/2", "1/2"]], [[1, 0], [0, "1/2"]])
        >>> ssp22.characteristic.numerator
        (Fraction(1, 1), Fraction(1, 1), Fraction(1, 2))
    """
    a, b = ([[to_fraction(x) for x in row] for row in block] for block in (alpha, beta))
    s = len(a[0]) if a else 0
    if len(a) not in (s, s + 1) or len(b) != len(a) or any(len(row) != s for row in [*a, *b]):
        raise ArgumentError(
            f"alpha has {len(a)} rows of length {[len(row) for row in a]}, beta {len(b)} of "
            f"{[len(row) for row in b]}; both must be (s, s) or (s + 1, s)"
        )
    if len(a) == s:
        a, b = [[_ZERO] * s, *a], [[_ZERO] * s, *b]
    v = [[_ONE - sum(row)] for row in a]
    inner = [[(i == j) - a[i][j] for j in range(s)] for i in range(s)]
    stages = solve(inner, [[*x, *y] for x, y in zip(v[:s], b[:s], strict=True)])
    U, A = [row[:1] for row in stages], [row[1:] for row in stages]
    B = [[x + y for x, y in zip(b[s], matmul([a[s]], A)[0], strict=True)]]
    V = [[v[s][0] + matmul([a[s]], U)[0][0]]]
    exact = entries_are_exact(alpha) and entries_are_exact(beta)
    return from_tableau(Tableau(A, U, B, V), exact=exact, name=name, source=source)


@accepts
def from_multistep(
    alpha: Sequence[Any], beta: Sequence[Any], *, name: str = "", source: str = ""
) -> GeneralLinearMethod:
    """A linear multistep method sum_j alpha_j y_{n+j} = h sum_j beta_j f_{n+j}, j = 0, ..., k.

    The states are (y_{n+k-1}, ..., y_n), so M(z) is the companion matrix of rho(zeta) - z sigma(zeta).
    Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 1993, III.2.

    Args:
        alpha: ``(k + 1,)``, oldest first.
        beta: ``(k + 1,)``, oldest first; ``beta[k] != 0`` makes the method implicit.
        name: shown in results.
        source: where the coefficients are from.

    Raises:
        ArgumentError: the lengths differ, k = 0, or ``alpha[k]`` is 0.

    Example:
        >>> leapfrog = from_multistep([-1, 0, 1], [0, 2, 0])
        >>> float(leapfrog.imaginary_interval()), leapfrog.order
        (1.0, 2)
    """
    k = len(alpha) - 1
    if len(beta) != len(alpha) or k < 1:
        raise ArgumentError(f"alpha has {len(alpha)} and beta {len(beta)} coefficients; both need k + 1 >= 2")
    lead = to_fraction(alpha[k])
    if lead == 0:
        raise ArgumentError("alpha[k] is 0; the newest value must appear: drop the last coefficients")
    a = [-to_fraction(x) / lead for x in alpha[:k]][::-1]
    b = [to_fraction(x) / lead for x in beta]
    unit = identity(k)
    past = [j for j in range(k) if b[j]]
    weights = [b[j] for j in past]
    A: Matrix = [[_ZERO] * len(past) for _ in past]
    U = [unit[k - 1 - j] for j in past]
    if b[k]:
        weights = [*weights, b[k]]
        A, U = [[*row, _ZERO] for row in A] + [list(weights)], [*U, a]
    B = [weights] + [[_ZERO] * len(weights) for _ in range(k - 1)]
    exact = entries_are_exact([alpha, beta])
    return from_tableau(Tableau(A, U, B, [a, *unit[: k - 1]]), exact=exact, name=name, source=source)


@accepts
def from_additive_butcher(
    tableaux: Sequence[tuple[Sequence[Sequence[Any]], Sequence[Any]]], *, name: str = "", source: str = ""
) -> GeneralLinearMethod:
    """An additive (IMEX) Runge-Kutta method for y' = f_0(y) + f_1(y) + ..., one tableau for each field.

    Every field is evaluated at the same stages. Source: C. A. Kennedy, M. H. Carpenter, Appl. Numer. Math. 44 (2003).

    Args:
        tableaux: pairs ``(A, b)`` of full size ``(s, s)`` and ``(s,)``.
        name: shown in results.
        source: where the coefficients are from.

    Raises:
        ArgumentError: the tableaux have different numbers of stages.

    Example:
        >>> imex_euler = from_additive_butcher([([[0, 0], [1, 0]], [1, 0]), ([[0, 0], [0, 1]], [0, 1])])
        >>> complex(imex_euler.stability_matrix(-1.0, -1.0)[0, 0])
        0j
    """
    sizes = {len(b) for _, b in tableaux} | {len(A) for A, _ in tableaux}
    if len(sizes) != 1:
        raise ArgumentError(f"the tableaux have {sorted(sizes)} stages; additive methods share their stages")
    s = sizes.pop()
    # An evaluation that nothing uses would only add a stage.
    used = [
        (i, f)
        for i in range(s)
        for f, (A, b) in enumerate(tableaux)
        if b[i] != 0 or any(A[row][i] != 0 for row in range(s))
    ]
    full = [[tableaux[g][0][i][j] for j, g in used] for i, _ in used]
    weights = [[tableaux[g][1][j] for j, g in used]]
    fields = [f for _, f in used]
    return GeneralLinearMethod(full, [[1]] * len(used), weights, [[1]], fields=fields, name=name, source=source)


@accepts
def from_partitioned_butcher(
    first: tuple[Sequence[Sequence[Any]], Sequence[Any]],
    second: tuple[Sequence[Sequence[Any]], Sequence[Any]],
    *,
    name: str = "",
    source: str = "",
    order: int | None = None,
) -> GeneralLinearMethod:
    """A partitioned Runge-Kutta method for q' = f_0(p), p' = f_1(q); the states are (q, p).

    With one z for both fields the test problem is q' = lambda p, p' = lambda q, whose eigenvalues are +-lambda: on the
    imaginary axis the harmonic oscillator. Source: E. Hairer, C. Lubich, G. Wanner, Geometric Numerical
    Integration, 2nd ed. 2006, II.2.

    Args:
        first: ``(A, b)`` for q.
        second: ``(A, b)`` for p, with the same number of stages.
        name: shown in results.
        source: where the coefficients are from.
        order: the order, from the source.
    """
    (A, b), (A2, b2) = first, second
    s = len(b)
    zeros = [0] * s
    # Stages p_i feed field 0 and stages q_i feed field 1; they are interleaved so that explicit ones stay in sequence.
    p_rows = [[*zeros, *row] for row in A2]
    q_rows = [[*row, *zeros] for row in A]
    place = _sequence([*p_rows, *q_rows])
    rows, inputs = [*p_rows, *q_rows], [[0, 1]] * s + [[1, 0]] * s
    weights = [[*b, *zeros], [*zeros, *b2]]
    return GeneralLinearMethod(
        [[rows[i][j] for j in place] for i in place],
        [inputs[i] for i in place],
        [[row[j] for j in place] for row in weights],
        [[1, 0], [0, 1]],
        fields=[int(i >= s) for i in place],
        name=name,
        source=source,
        declared_order=order,
    )


@accepts
def from_stability_function(
    numerator: Sequence[Any], denominator: Sequence[Any] = (1,), *, name: str = "", source: str = ""
) -> GeneralLinearMethod:
    """A one-state method with R(z) = N(z) / D(z): a chain of stages, each z times the one before.

    It stands for every method with this stability function; its tableau is not that of a published method.

    Args:
        numerator: coefficients of N, constant term first.
        denominator: coefficients of D, constant term first, not 0.
        name: shown in results.
        source: where the function is from.

    Raises:
        ArgumentError: D(0) = 0.

    Example:
        >>> from_stability_function([1, "1/2"], [1, "-1/2"]).is_A_stable
        True
    """
    N, D = ([to_fraction(c) for c in p] for p in (numerator, denominator))
    if not D or D[0] == 0:
        raise ArgumentError("denominator has D(0) = 0; a step must be defined at z = 0")
    s = max(len(N), len(D)) - 1
    N, D = ([c / D[0] for c in p] + [_ZERO] * (s + 1 - len(p)) for p in (N, D))
    A = [[-d for d in D[1:]]] if s else []
    A += [[Fraction(int(j == i)) for j in range(s)] for i in range(s - 1)]
    U = [[Fraction(int(i == 0))] for i in range(s)]
    B = [[n - N[0] * d for n, d in zip(N[1:], D[1:], strict=True)]]
    exact = entries_are_exact([numerator, denominator])
    return from_tableau(Tableau(A, U, B, [[N[0]]]), exact=exact, name=name, source=source)


def _sequence(rows: Sequence[Sequence[Any]]) -> list[int]:
    """An order of the stages in which each follows those it needs, or the given order when there is none."""
    needs = [{j for j, a in enumerate(row) if a != 0} for row in rows]
    done: list[int] = []
    while len(done) < len(rows):
        ready = [i for i in range(len(rows)) if i not in done and needs[i] <= set(done)]
        if not ready:
            return list(range(len(rows)))
        done.append(ready[0])
    return done
