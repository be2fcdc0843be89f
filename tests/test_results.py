"""Results become strict JSON in one encoding, and find their picture by name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stabkit
from stabkit import plotting
from stabkit.errors import ArgumentTypeError, StabkitError
from stabkit.pictures import PICTURES
from stabkit.results import Result, encode

PACKAGE = Path(stabkit.__file__).parent


@dataclasses.dataclass(frozen=True, eq=False)
class Inner(Result):
    value: float
    _hidden = 1

    def _contents(self):
        return {**super()._contents(), "twice": 2 * self.value}


@dataclasses.dataclass(frozen=True, eq=False)
class Outer(Result):
    inner: tuple[Inner, ...]
    tensor: torch.Tensor
    array: np.ndarray
    named: dict[str, complex]
    absent: None = None


def strictly(value):
    return json.loads(json.dumps(value, allow_nan=False))


def test_nested_results_tensors_arrays_and_complex_numbers():
    result = Outer((Inner(math.nan),), torch.tensor([[1.0, math.inf]]), np.array([1 - 2j]), {"z": 3j})
    assert strictly(result.to_dict()) == {
        "inner": [{"value": "NaN", "twice": "NaN"}],
        "tensor": [[1.0, "Infinity"]],
        "array": [[1.0, -2.0]],
        "named": {"z": [0.0, 3.0]},
        "absent": None,
    }


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
)
def test_tensors_of_every_dtype(dtype: torch.dtype):
    tensor = torch.ones(2, dtype=dtype, requires_grad=dtype.is_floating_point)
    one = [1.0, 0.0] if dtype.is_complex else 1
    assert strictly(encode(tensor)) == [one, one]


@given(st.recursive(st.floats() | st.integers() | st.text() | st.booleans() | st.none(), st.lists, max_leaves=8))
def test_every_float_survives(value):
    def read(data, like):
        if isinstance(like, float):
            return float(data)
        return [read(a, b) for a, b in zip(data, like, strict=True)] if isinstance(like, list) else data

    assert repr(read(strictly(encode(value)), value)) == repr(value)


def test_what_has_no_data_is_refused_or_described():
    with pytest.raises(ArgumentTypeError, match="cannot hold a object"):
        encode([object()])
    assert encode({"f": {1}}, default=repr) == {"f": "{1}"}


def test_a_notebook_shows_the_text():
    @dataclasses.dataclass(frozen=True)
    class Told(Result):
        def __str__(self):
            return "a < b"

    assert Told()._repr_html_() == "<pre>a &lt; b</pre>"


def test_a_result_without_a_picture_says_so():
    with pytest.raises(StabkitError, match="no picture of a Inner"):
        Inner(1.0).plot()


@cache
def classes() -> list[tuple[str, str, set[str]]]:
    """File, name and methods of every class of the package."""
    return [
        (str(path.relative_to(PACKAGE)), node.name, {f.name for f in node.body if isinstance(f, ast.FunctionDef)})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]


def test_every_picture_is_of_one_class_and_takes_ax():
    named = [name for _, name, _ in classes()]
    made_for_a_picture = {"Records", "Grid", "Lattice"}
    for kind, draws in PICTURES.items():
        for shown, function in draws.items():
            assert shown in made_for_a_picture or named.count(shown) == 1, shown
            parameters = list(inspect.signature(getattr(plotting, function)).parameters)
            assert parameters[1:2] == ["ax"] or kind in ("overview", "updates")


def test_no_class_writes_its_data_by_hand():
    by_hand = [f"{path}: {name}" for path, name, methods in classes() if path != "results.py" and "to_dict" in methods]
    assert by_hand == []
