"""Which package may import which: always a lower one, never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fisedit_compile"

#: From the lowest floor to the highest. A module imports from floors below its own, and within its own package.
FLOORS = (
    {"errors", "config", "utils"},
    {"ir"},
    {"planning", "masks", "architectures", "testing"},
    {"kernels"},
    {"passes"},
    {"compiler"},
    {"cost_model"},
    {"macs"},
    {"cache", "explain"},
    {"runtime"},
    {"sparse_unet", "backend", "vae"},
    {"editing"},
    {"quality"},
    {"serving"},
    {"bench"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own; links to folders are followed."""
    found = {}
    for folder in (PACKAGE, *(each for each in PACKAGE.iterdir() if each.is_dir())):
        for path in folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"):
            parts = [*path.relative_to(PACKAGE).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules of the package that a file imports, wherever in it, and the lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fisedit_compile":
            assert node.level == 0
            origin = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{origin}.{alias.name}".lstrip(".")
                yield inner if inner in known else origin, node.lineno
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name.partition(".")[2], node.lineno)
                for alias in node.names
                if alias.name.startswith("fisedit_compile.")
            )


MODULES = modules()
IMPORTS = {name: list(imports(path, MODULES)) for name, path in MODULES.items() if name}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_modules_are_found_in_linked_folders_too() -> None:
    assert {"passes.manager", "kernels.ops", "compiler.lowered"} <= MODULES.keys()
    assert any(origin.startswith("kernels.") for origin, _ in IMPORTS["kernels.ops"])


@pytest.mark.parametrize("name", sorted({room(name) for name in IMPORTS}))
def test_every_package_has_a_floor(name: str) -> None:
    assert name in FLOOR_OF, f"say in FLOORS which packages {name} may import"


def test_nothing_imports_upwards() -> None:
    wrong = [
        f"{name}:{line} imports {origin}"
        for name, found in IMPORTS.items()
        for origin, line in found
        if origin and room(origin) != room(name) and FLOOR_OF[room(origin)] >= FLOOR_OF[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    # Raises a CycleError that names the modules.
    TopologicalSorter(
        {name: {origin for origin, _ in found if origin != name} for name, found in IMPORTS.items()}
    ).prepare()
