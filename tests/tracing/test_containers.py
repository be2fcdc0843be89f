from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from stabkit.tracing import trace
from stabkit.tracing.recording.containers import map_tensors, named_tensors

Pair = namedtuple("Pair", ["left", "right"])
ONE, TWO = torch.ones(1), 2 * torch.ones(1)


@dataclass
class Batch:
    x: Tensor
    label: str
    more: list[Tensor]


@pytest.mark.parametrize(
    ("container", "paths"),
    [
        (ONE, [""]),
        ((ONE, 3, [TWO]), ["0", "2.0"]),
        ({"a": ONE, "b": {"c": TWO}}, ["a", "b.c"]),
        (OrderedDict(a=ONE, b=TWO), ["a", "b"]),
        (Pair(ONE, TWO), ["0", "1"]),
        (Batch(ONE, "text", [TWO]), ["x", "more.0"]),
        (BaseModelOutput(last_hidden_state=ONE, hidden_states=(TWO,)), ["last_hidden_state", "hidden_states.0"]),
        (BatchEncoding({"input_ids": ONE}), ["input_ids"]),
        (None, []),
        (torch.nn.Linear(2, 2), []),
    ],
)
def test_tensors_are_found_replaced_and_named_by_their_path(container, paths):
    assert [path for path, _ in named_tensors(container)] == paths
    doubled = map_tensors(container, lambda t: 2 * t)
    assert type(doubled) is type(container)
    assert [path for path, _ in named_tensors(doubled)] == paths
    for (_, old), (_, new) in zip(named_tensors(container), named_tensors(doubled), strict=True):
        assert torch.equal(new, 2 * old)


def test_a_container_that_holds_itself_is_walked_once():
    loop: list = [ONE]
    loop.append(loop)
    assert [path for path, _ in named_tensors(loop)] == ["0"]


@pytest.mark.parametrize(
    ("wrap", "unwrap", "source"),
    [
        (lambda x: {"x": x}, lambda b: b["x"], "0.x"),
        (lambda x: Pair(x, None), lambda b: b.left, "0.0"),
        (lambda x: Batch(x, "", []), lambda b: b.x, "0.x"),
        (lambda x: [[x]], lambda b: b[0][0], "0.0.0"),
    ],
    ids=["dict", "namedtuple", "dataclass", "nested list"],
)
def test_a_model_may_take_and_return_any_container(wrap, unwrap, source):
    x = torch.randn(2, 3, dtype=torch.float64)
    flow = trace(lambda batch: wrap(unwrap(batch).sin()), wrap(x))
    assert flow.source_name == source
    torch.testing.assert_close(flow.jacobian().dense(), torch.diag_embed(x.cos()))
