"""Imports follow the layout: a module imports only from those that stand above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stabkit"

# from the ground up; `report` is data and stands below the analysis that fills it
LAYERS = [
    "_version",
    "errors",
    "pictures",
    "results",
    "statistics",
    "tables",
    "hashing",
    "parallel",
    "threads",
    "integrators",
    "operators",
    "tracing",
    "jacobians",
    "walk",
    "growth",
    "identification",
    "meanfield",
    "attribution",
    "diagnosis",
    "checkpoints",
    "report",
    "weights",
    "distributed",
    "planning",
    "analysis",
    "streaming",
    "comparison",
    "plotting",
    "monitor",
    "demo",
    "cli",
    "__main__",
]

# convenience methods of results reach up, inside the function: (where, what)
UPWARD = {
    ("report", "plotting"),  # report.save("report.png")
    ("comparison", "plotting"),  # comparison.save("sweep.png")
}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
    """The layers imported, and whether at the top of the module (type-checking blocks count as inside)."""
    top = {id(n) for statement in tree.body if isinstance(statement, ast.Import | ast.ImportFrom) for n in [statement]}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"stabkit.{a.name}" for a in node.names] if node.module == "stabkit" else [node.module or ""]
        else:
            continue
        found += [(name.split(".")[1], id(node) in top) for name in names if name.startswith("stabkit.")]
    return found


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != PACKAGE or f.name != "__init__.py"], ids=str)
def test_imports_point_downwards(path: Path):
    here = layer(path)
    for there, at_top in imports(ast.parse(path.read_text())):
        if there in ("__version__",):
            continue
        assert there in LAYERS, f"{path.name} imports stabkit.{there}, which has no place in the layout"
        below = LAYERS.index(there) <= LAYERS.index(here)
        assert below or (not at_top and (here, there) in UPWARD), f"{path} imports stabkit.{there} from above it"


def test_every_module_has_a_place():
    assert {layer(path) for path in FILES} <= {*LAYERS, "__init__"}


def test_integrators_know_no_torch():
    for path in (PACKAGE / "integrators").glob("*.py"):
        assert "torch" not in {
            name.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for name in n.names
        }


def test_an_analysis_imports_little_beside_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import stabkit.analysis, stabkit.checkpoints; "
        "heavy = {'scipy', 'networkx', 'matplotlib', 'pandas', 'torchvision', 'timm', 'transformers'}; "
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
