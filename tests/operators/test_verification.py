from __future__ import annotations

import pytest
import torch

from stabkit.operators import Jacobian, from_dense
from stabkit.operators.verification import disagreement


def against(J: Jacobian, A: torch.Tensor) -> float:
    return disagreement(J, lambda u: (u.unsqueeze(1).to(A.dtype) @ A).squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_matrix_itself_agrees(dtype):
    A = torch.randn(2, 30, 40, dtype=torch.float64).to(dtype)
    assert against(from_dense(A), A) <= 1
    assert against(from_dense(torch.zeros_like(A)), torch.zeros_like(A)) == 0


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float64, 1e-9), (torch.float32, 1e-1)])
def test_one_wrong_entry_is_seen(dtype, wrong):
    A = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    changed = A.clone()
    changed[1, 7, 9] += wrong
    assert against(from_dense(A), changed) > 1


def test_matrices_that_are_not_finite_never_agree():
    A = torch.eye(3)
    A[1, 1] = float("nan")
    assert against(from_dense(A), A.unsqueeze(0)) == float("inf")
