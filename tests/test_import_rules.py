"""Passes stand alone, and so do references and launchers: what two of them need is a file of its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PASSES = sorted((ROOT / "passes").glob("*/*.py"))
SCRIPTS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", each.name) for each in node.names)
        elif isinstance(node, ast.Import):
            yield from ((each.name, "") for each in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_import_what_is_there(path: Path) -> None:
    """Few of them run in tests, and types are checked for the package alone."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    ours = [(node.module, each.name) for node in found for each in node.names if _is_ours(node.module)]
    assert [each for each in ours if not _exists(*each)] == []


def _is_ours(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "fisedit_compile"


def _exists(module: str, name: str) -> bool:
    return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("path", PASSES, ids=name)
def test_a_pass_imports_no_other_pass(path: Path) -> None:
    others = {f"fisedit_compile.passes.{each.parent.name}" for each in PASSES}
    assert [module for module, _ in imports(path) if module.rpartition(".")[0] in others] == []


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_a_launcher_imports_no_reference_and_a_reference_no_triton(path: Path) -> None:
    found = list(imports(path))
    if path.stem.endswith(("_triton", "_launch")):
        assert [each for _, each in found if each.endswith("_reference")] == []
    else:
        triton = [module for module, _ in found if module == "triton" or module.endswith(("_triton", "_launch"))]
        assert [module for module in triton if module != "fisedit_compile.kernels.launch.triton_launch"] == []
