"""Every refusal is one family of errors, and besides the built-in error that Python would raise in its place."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import stabkit
from stabkit import errors, integrators, meanfield

PACKAGE = Path(errors.__file__).parent

# raised to be caught inside the package, or because a protocol of Python or torch asks for this very class
INTERNAL = {
    "__init__.py": {"AttributeError"},  # module __getattr__
    "cli/imports.py": {"AttributeError"},  # as every module, where it has no such name
    "checkpoints/distributed.py": {"ValueError"},  # damage, told as a CheckpointError with the name of the file
    "checkpoints/pickles.py": {"ValueError"},
    "diagnosis/__init__.py": {"AttributeError"},
    "integrators/rational_matrices.py": {"ZeroDivisionError"},  # arithmetic
    "integrators/rational_polynomials.py": {"ZeroDivisionError"},
    "jacobians/search.py": {"NotImplementedError"},  # abstract
    "monitor/clipping.py": {"RuntimeError"},  # as torch.nn.utils.clip_grad_norm_, in whose place it stands
    "monitor/monitor.py": {"RuntimeError"},
    "monitor/reading.py": {"ValueError"},
    "report/decoding.py": {"TypeError"},
    "report/encoding.py": {"TypeError"},  # readers, told as a ReportError with the place in the file
    "tracing/products/step_products.py": {"NotImplementedError"},
}
BUILT_IN = {"ValueError", "TypeError", "IndexError", "KeyError", "RuntimeError", "NotImplementedError"}
BUILT_IN |= {"AttributeError", "ZeroDivisionError", "AssertionError", "Exception"}


def raised(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error))
    return found


def test_no_built_in_error_is_raised_for_a_user():
    there = {str(path.relative_to(PACKAGE)): raised(path) & BUILT_IN for path in sorted(PACKAGE.rglob("*.py"))}
    assert {name: kinds for name, kinds in there.items() if kinds} == INTERNAL


def test_argument_errors_are_also_built_in_errors():
    assert issubclass(errors.ArgumentError, ValueError)
    assert issubclass(errors.ArgumentTypeError, TypeError)
    assert issubclass(errors.OutOfRangeError, IndexError)


@pytest.mark.parametrize(
    ("call", "built_in", "says"),
    [
        (lambda: stabkit.eigenvalues(np.eye(3), k=4), ValueError, "k=4"),
        (lambda: stabkit.eigenvalues("J"), TypeError, "expected a Jacobian"),
        (lambda: stabkit.lyapunov_spectrum("flow"), TypeError, "flow='flow' is a str"),
        (lambda: stabkit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).jacobian(3), IndexError, "start=3"),
        (lambda: integrators.GeneralLinearMethod([[0]], [[1]], [[1]], []), ValueError, "V"),
        (lambda: integrators.named("rk4", s=3), TypeError, "rk4 does not take s"),
        (lambda: meanfield.fixed_point("no", sigma_w=1.0), ValueError, "activation='no'"),
    ],
)
def test_refusals_name_the_argument(call, built_in: type[Exception], says: str):
    with pytest.raises(stabkit.StabkitError, match=says) as caught:
        call()
    assert isinstance(caught.value, built_in)
