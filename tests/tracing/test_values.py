from __future__ import annotations

import torch

from stabkit.tracing.graph.values import Meta, meta_of, operation, value_of


def test_an_in_place_write_makes_a_new_value_of_the_same_tensor():
    x = torch.ones(2, requires_grad=True).clone()
    before = value_of(x)
    x.mul_(2)
    assert value_of(x) != before
    assert value_of(x) == value_of(x)


def test_outputs_of_one_operation_are_different_values_of_one_node():
    left, right = torch.ones(2, 4, requires_grad=True).split(2, dim=1)
    assert value_of(left).node is value_of(right).node
    assert (value_of(left).output, value_of(right).output) == (0, 1)


def test_meta_tells_shape_dtype_and_device_of_a_value_and_of_a_leaf():
    leaf = torch.zeros(2, 3, dtype=torch.complex64, requires_grad=True)
    expected = Meta((2, 3), torch.complex64, torch.device("cpu"))
    assert meta_of(value_of(leaf)) == expected
    assert meta_of(value_of(leaf * 2)) == expected
    assert expected.numel == 6


def test_operations_are_named_without_their_backward_suffix():
    x = torch.ones(2, 2, requires_grad=True)
    assert operation(value_of(x.tanh()).node) == "Tanh"
    assert operation(value_of(x @ x).node) == "Mm"
