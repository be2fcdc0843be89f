"""Generated programs: truth against closed forms, a sample that is read right, a judge that sees what is false."""

from __future__ import annotations

import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from tests.identification.generated import read, readings_of
from tests.identification.generated_methods import BY_NAME, TABLEAUX, stability_matrix
from tests.identification.generated_programs import draw
from tests.identification.generated_verdict import judge

SEEDS = (1, 49, 65, 77, 80, 89, 103, 124, 131, 144, 152, 188, 201)  # of methods and fields as they are listed
RUNGE_KUTTA = 149
Z = 0.3 + 0.4j
ROOTS = {  # a polynomial whose roots are the eigenvalues of M(z), for h = 1
    "forward Euler": [1, -(1 + Z)],
    "ab2": [1, -(1 + 1.5 * Z), 0.5 * Z],
    "ab3": [1, -(1 + 23 * Z / 12), 16 * Z / 12, -5 * Z / 12],
    "leapfrog, two-step": [1, -2 * Z, -1],
    "Verlet, position form": [1, -(2 + Z), 1],
    "velocity Verlet": [1, -(2 + Z), 1],
    "symplectic Euler": [1, -(2 + Z), 1],
    "Lie, 2 fields": [1, -((1 + Z) ** 2)],
    "Strang, Euler inside": [1, -((1 + Z / 2) ** 2) * (1 + Z)],
    "Strang, midpoint inside": [1, -((1 + Z / 2 + Z**2 / 8) ** 2) * (1 + Z + Z**2 / 2)],
    "parallel branches": [1, -(1 + 2 * Z)],
    "backward Euler, 2 iterations": [1, -(1 + Z + Z**2)],
    "ssp33": [1, -(1 + Z + Z**2 / 2 + Z**3 / 6)],
}


def _eigenvalues(name: str, spelling: str) -> np.ndarray:
    method = BY_NAME[name]
    M = stability_matrix(method, method.bodies[spelling], 1.0, dict.fromkeys(method.fields, Z)).numpy()
    return np.sort_complex(np.linalg.eigvals(M))


@pytest.mark.parametrize("name", ROOTS)
def test_lines_of_a_method_have_the_eigenvalues_of_its_closed_form(name):
    for spelling in BY_NAME[name].bodies:
        np.testing.assert_allclose(_eigenvalues(name, spelling), np.sort_complex(np.roots(ROOTS[name])), atol=1e-12)


@pytest.mark.parametrize("name", TABLEAUX)
def test_every_spelling_of_a_runge_kutta_step_has_its_stability_function(name):
    rows, weights, _ = TABLEAUX[name]
    A = np.zeros((len(weights), len(weights)))
    for i, row in enumerate(rows):
        A[i + 1, : len(row)] = [float(Fraction(a)) for a in row]
    b = np.array([float(Fraction(w)) for w in weights])
    R = 1 + Z * b @ np.linalg.solve(np.eye(len(b)) - Z * A, np.ones(len(b)))
    for spelling in BY_NAME[name].bodies:
        np.testing.assert_allclose(_eigenvalues(name, spelling), [R], atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_program_is_read_right(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = read(seed)
    assert outcome.verdict == "right", (outcome.program.choices, outcome.why, outcome.told)


def test_a_reading_of_another_method_is_judged_wrong():
    program = draw(RUNGE_KUTTA)
    readings = readings_of(program)
    for other in ("midpoint", "rk4", "forward Euler"):
        method = BY_NAME[other]
        false = replace(program, method=method, spelling=next(iter(method.bodies)))
        assert judge(false, readings).verdict == "wrong", other
