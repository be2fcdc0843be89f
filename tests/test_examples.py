"""The examples: each is a lesson with a picture, and the gallery shows all of them as they are."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "gallery")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_a_lesson_with_a_picture(script: Path):
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert "What to see in the picture" in " ".join(text.split())
    assert script.with_suffix(".png").stat().st_size > 5000


def test_the_gallery_is_what_the_examples_make_it():
    spec = importlib.util.spec_from_file_location("gallery", FOLDER / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    assert (FOLDER / "README.md").read_text() == gallery.page(), "run: python examples/gallery.py examples/README.md"


def test_docstrings_lead_to_examples_that_exist():
    package = FOLDER.parent / "stabkit"
    named = {name for path in package.rglob("*.py") for name in re.findall(r"examples/(\w+)\.py", path.read_text())}
    assert named <= {path.stem for path in SCRIPTS}
    assert len(named) >= 10


def test_the_readme_leads_to_the_gallery_and_shows_pictures_that_exist():
    text = (FOLDER.parent / "README.md").read_text()
    links = re.findall(r"\]\((examples/[^)]+)\)", text)
    assert "examples/README.md" in links
    assert all((FOLDER.parent / link).exists() for link in links)
