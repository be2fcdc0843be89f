from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.report import encoding
from stabkit.results import encode


def strict(text: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@settings(deadline=None, max_examples=200)
@given(st.floats())
def test_every_float_survives(value):
    assert same(encoding.number(strict(json.dumps(encode(value)))), value)


@settings(deadline=None, max_examples=100)
@given(st.floats(), st.floats())
def test_every_complex_number_survives(real, imaginary):
    back = encoding.complex_number(strict(json.dumps(encode(complex(real, imaginary)))))
    assert same(back.real, real)
    assert same(back.imag, imaginary)


def test_numpy_values_become_plain_ones():
    encoded = encode({"a": np.float32(0.5), "b": np.array([[1, 2]]), "c": np.bool_(True), 3: (None, "x")})
    assert encoded == {"a": 0.5, "b": [[1, 2]], "c": True, "3": [None, "x"]}
    assert type(encoded["a"]) is float


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="cannot hold a set"):
        encode({"a": [{1}]})


@pytest.mark.parametrize("value", ["nan", "1.0", True, None, [1.0], {}])
def test_a_number_is_a_number(value):
    with pytest.raises(TypeError, match="expected a number"):
        encoding.number(value)


def test_lines_are_json_with_one_object_a_line():
    data = {"name": 'a\n"b"', "steps": [{"z": [[1.0, 2.0]] * 50}, {"z": []}], "empty": [], "plain": [1, 2]}
    text = encoding.lines(data)
    assert strict(text) == data
    assert len(text.splitlines()) == 9
