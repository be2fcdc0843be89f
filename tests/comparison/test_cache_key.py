from __future__ import annotations

import torch
from torch import nn

from stabkit.comparison.cache import content_hash, recipe_hash
from stabkit.hashing import content_key, raw


def test_content_not_names_of_files(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 3_000_000)
    (tmp_path / "b").write_bytes(b"1" * 3_000_000)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"1" * 2_999_999 + b"2")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_a_directory_is_its_names_and_contents(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "w").write_bytes(b"1")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")
    (tmp_path / "two" / ".stabkit").mkdir()
    (tmp_path / "two" / ".stabkit" / "x").write_bytes(b"kept by an earlier run")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")
    (tmp_path / "two" / "inner" / "w").rename(tmp_path / "two" / "inner" / "v")
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")


class Step(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h
        self.layer = nn.Linear(2, 2)


def test_an_architecture_is_its_structure_settings_and_code_not_its_weights():
    def key(*modules):
        return recipe_hash({}, *modules)

    assert key(Step(0.1)) == key(Step(0.1)) == key(Step(0.1).eval())
    assert key(Step(0.1)) != key(Step(0.2))
    assert key(nn.Linear(2, 2)) != key(nn.Linear(2, 3))
    for held in ([1], {"a": 1}, torch.ones(1), lambda: 1):
        other = [2] if isinstance(held, list) else {"a": 2} if isinstance(held, dict) else None
        other = other or (torch.zeros(1) if isinstance(held, torch.Tensor) else lambda: 2)
        assert key(Step(held)) == key(Step(held)) != key(Step(other))
    assert key(Step(n for n in [1])) == ""


def test_tensors_and_recipes():
    assert content_key((torch.ones(2), {"a": torch.ones(1)})) != content_key((torch.ones(2), {"b": torch.ones(1)}))
    assert content_key(torch.ones(2)) != content_key(torch.ones(2, 1))
    assert content_key(torch.ones(2).bfloat16()) == content_key(torch.ones(2).bfloat16())
    assert recipe_hash({"a": 1, "b": 2}) == recipe_hash({"a": 1, "b": 2}) != recipe_hash({"a": 1, "b": 3})


def test_lazily_conjugated_and_negated_tensors_have_the_bytes_of_what_they_are():
    z = torch.randn(3, 2, dtype=torch.complex128)
    assert bytes(raw(z.conj())) == bytes(raw(z.conj().resolve_conj()))
    assert bytes(raw(z.conj().imag)) == bytes(raw(z.conj().imag.resolve_neg()))
    assert bytes(raw(z.conj())) != bytes(raw(z))
