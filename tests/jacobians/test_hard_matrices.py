import numpy as np
import pytest
import torch

from stabkit.jacobians import eigenvalues, singular_values
from tests.jacobians.hard_matrices import (
    eigenvalue_error,
    hard_matrices,
    operator,
    rows,
    singular_value_error,
)

N, K = 60, 6
HARD = {hard.name: hard for hard in hard_matrices(N)}
# eigenvalues that no backward stable method can know from products with the matrix alone
LOST = {"Jordan", "Jordan rotated", "defective", "nilpotent shift", "nilpotent rotated", "Grcar"}


@pytest.mark.parametrize("method", ["dense", "krylov-schur"])
@pytest.mark.parametrize("which", ["LM", "LR"])
@pytest.mark.parametrize("name", HARD)
def test_no_wrong_eigenvalue_is_marked_converged(name, which, method):
    hard = HARD[name]
    spectrum = eigenvalues(operator(hard.A), K, which, method=method)
    assert eigenvalue_error(spectrum, hard.true_eigenvalues(), which) < 1e-12
    assert name in LOST or bool(spectrum.converged.all())


@pytest.mark.parametrize("method", ["dense", "golub-kahan"])
@pytest.mark.parametrize("which", ["LM", "SM"])
@pytest.mark.parametrize("name", HARD)
def test_no_wrong_singular_value_is_marked_converged(name, which, method):
    hard = HARD[name]
    spectrum = singular_values(operator(hard.A), K, which, method=method)
    assert singular_value_error(spectrum, hard.true_singular_values(), which) < 1e-13
    assert which == "SM" or bool(spectrum.converged.all())


@pytest.mark.parametrize("name", HARD)
def test_float32_products_keep_the_promise(name):
    hard = HARD[name]
    values = eigenvalues(operator(hard.A, torch.float32), K, "LM", method="krylov-schur")
    rounded = hard.A.astype(np.float32).astype(float)
    truth = hard.true_eigenvalues() if name in LOST else np.linalg.eigvals(rounded)
    assert eigenvalue_error(values, truth, "LM") < 1e-6
    spectrum = singular_values(operator(hard.A, torch.float32), K, method="golub-kahan")
    assert singular_value_error(spectrum, np.linalg.svd(rounded, compute_uv=False), "LM") < 1e-7


@pytest.mark.parametrize("name", ["Jordan", "nilpotent shift"])
def test_a_triangular_pattern_gives_exact_eigenvalues_of_a_defective_matrix(name):
    spectrum = eigenvalues(HARD[name].A)
    np.testing.assert_allclose(spectrum.values[0].numpy(), HARD[name].eigenvalues, atol=0)
    assert bool(spectrum.converged.all())


def test_small_singular_values_keep_their_digits():
    spectrum = singular_values(operator(HARD["logspaced"].A), 3, "SM")
    np.testing.assert_allclose(spectrum.values[0], np.logspace(0, -12, N)[::-1][:3], rtol=1e-3)


def test_the_table_has_a_line_for_every_matrix_and_part():
    lines = rows(24)
    assert len(lines) == 1 + 4 * len(HARD)
    identity = next(line for line in lines if line.startswith("identity ") and "sv LM" in line)
    assert "6/6" in identity
