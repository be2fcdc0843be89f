"""Imports follow the layout: down only, without circles, and no private name from another package.

Every import counts, also one inside a function and one for type checkers only: a name that is needed to understand a
module is a dependency, whenever it is loaded.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "stabkit"

# from the ground up; `report` is data and stands below the analysis that fills it
LAYERS = [
    "_version",
    "text",
    "errors",
    "arguments",
    "tables",
    "pictures",
    "results",
    "statistics",
    "tables",
    "hashing",
    "parallel",
    "threads",
    "turns",
    "garbage",
    "vocabulary",
    "integrators",
    "operators",
    "tracing",
    "jacobians",
    "walk",
    "growth",
    "curvature",
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

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def package_of(name: str) -> str:
    """The layer that a module belongs to; ``""`` for the front door ``stabkit`` itself."""
    return [*name.split("."), ""][1]


def imported(path: Path) -> list[tuple[str, str]]:
    """Every module of the package that a file imports from, wherever in the file, and the name that it takes."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "stabkit"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path} imports relatively; write the whole path")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stabkit":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in MODULES else (str(node.module), alias.name))
    return found


@cache
def imports() -> dict[str, list[tuple[str, str]]]:
    """What every module imports; read when a test asks, not by every process that collects the tests."""
    return {name: imported(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "stabkit"])
def test_imports_point_downwards(name: str):
    here = package_of(name)
    assert here in LAYERS, f"stabkit.{here} has no place in the layout"
    for module, taken in imports()[name]:
        if taken == "__version__":
            continue
        there = package_of(module)
        assert there in LAYERS, f"{name} imports {module}, which has no place in the layout"
        assert LAYERS.index(there) <= LAYERS.index(here), f"{name} imports {module} from above it"


def test_no_files_import_each_other_in_a_circle():
    graph = nx.DiGraph()
    for name, found in imports().items():
        graph.add_edges_from((name, there) for there, _ in found if there != name)
    assert [sorted(files) for files in nx.strongly_connected_components(graph) if len(files) > 1] == []


def test_no_private_name_crosses_packages():
    crossing = [
        f"{name} takes {taken or module} of {module}"
        for name, found in imports().items()
        for module, taken in found
        if package_of(module) != package_of(name)
        and any(part.startswith("_") and not part.startswith("__") for part in (*module.split(".")[2:], taken))
    ]
    assert crossing == []


def test_integrators_know_no_torch():
    for path in (PACKAGE / "integrators").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "torch" not in {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "torch", path


def test_what_users_are_told_to_call_exists():
    """Names such as ``stabkit.trace`` within messages, remedies and docstrings; a name alone is a key of ours."""
    missing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w./])stabkit(?:\.[A-Za-z_]\w*)+(?![\w/])", node.value)
                missing |= {f"{path.name}: {name}" for name in named if name != node.value and not _exists(name)}
    assert missing == set()


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What a fresh process says: which heavy packages an analysis imports, then which compilers a diagnosis does."""
    code = (
        "import sys, torch; before = set(sys.modules); import stabkit.analysis, stabkit.checkpoints; "
        "heavy = {'scipy', 'networkx', 'matplotlib', 'pandas', 'torchvision', 'timm', 'transformers'}; "
        "print(sorted(heavy & (set(sys.modules) - before))); "
        "stabkit.diagnose(stabkit.trace(torch.nn.Linear(3, 3), torch.ones(2, 3))); "
        "print({'sympy', 'torch._dynamo', 'triton', 'scipy'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_an_analysis_imports_little_beside_torch(printed: list[str]):
    assert printed[0] == "[]"


def test_a_trace_does_not_import_the_compiler(printed: list[str]):
    """It takes as long as torch itself, and only what compiles needs it; sympy has nothing to compute."""
    assert printed[1] == "set()"
