"""No list of activations or norms stands outside of the vocabulary."""

from __future__ import annotations

import ast

import pytest
from torch import nn

from stabkit import vocabulary
from tests.test_vocabulary import PACKAGE


def _known_words() -> set[str]:
    classes = {n for n in dir(nn) if isinstance(getattr(nn, n), type) and issubclass(getattr(nn, n), nn.Module)}
    named = {n for n in classes if vocabulary.activation_of(getattr(nn, n)) or vocabulary.norm_of(getattr(nn, n))}
    named -= {"Identity"}
    return named | vocabulary.ACTIVATIONS | vocabulary.NORMS | set(vocabulary.activation_names()) - {"linear"}


def _word(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return (
        node.value.removesuffix("Backward0") if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
    )


def _lists(tree: ast.AST, words: set[str]) -> list[int]:
    found = []
    for node in ast.walk(tree):
        members: list[ast.expr] = []
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            members = node.elts
        elif isinstance(node, ast.Dict):
            members = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            members = [node.left, node.right]
        if len({_word(member) for member in members} & words) > 1:
            found.append(node.lineno)
    return found


def test_no_list_of_activations_or_norms_stands_elsewhere():
    words = _known_words()
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "vocabulary" and path.name != "__init__.py"  # these list what they export
        for line in _lists(ast.parse(path.read_text()), words)
    }
    assert found == set()


@pytest.mark.parametrize(
    "text", ["(nn.ReLU, nn.GELU)", "{'Relu', 'Tanh'}", "nn.LayerNorm | nn.BatchNorm2d", "{'tanh': 1, 'relu': 2}"]
)
def test_the_scan_sees_lists(text: str):
    assert _lists(ast.parse(text), _known_words())
