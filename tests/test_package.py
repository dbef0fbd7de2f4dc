"""The package as Python and pip see it: what importing it costs, its public names, and its two linked folders."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import fisedit_compile

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "kernels")


def run_python(code: str, *python_path: Path) -> list[str]:
    """Lines that ``python -c code`` prints in the repository root, which Python searches before ``python_path``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class TestImport:
    def test_loads_the_standard_library_alone(self) -> None:
        # A fifth of a second at most; torch and diffusers take several.
        code = "import sys; before = {*sys.modules}; import fisedit_compile; print(*{*sys.modules} - before, sep='\\n')"
        loaded = {name.partition(".")[0] for name in run_python(code)}
        assert "fisedit_compile" in loaded
        assert loaded - {"fisedit_compile"} <= sys.stdlib_module_names

    def test_sparsify_loads_no_diffusers(self) -> None:
        code = "import sys; from fisedit_compile import sparsify; print('diffusers' in sys.modules)"
        assert run_python(code)[-1] == "False"

    def test_version_is_that_of_the_installed_package(self) -> None:
        assert fisedit_compile.__version__ == importlib.metadata.version("fisedit-compile")

    @pytest.mark.parametrize("name", fisedit_compile.__all__)
    def test_public_name_resolves(self, name: str) -> None:
        assert getattr(fisedit_compile, name).__name__ == name

    def test_public_names_are_listed(self) -> None:
        assert set(fisedit_compile.__all__) == set(fisedit_compile._PUBLIC) <= set(dir(fisedit_compile))

    def test_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'sparsifier'"):
            _ = fisedit_compile.sparsifier

    def test_no_module_shadows_a_public_name(self) -> None:
        # Once loaded, a submodule of that name would replace the function on the package.
        modules = {path.stem for path in (ROOT / "fisedit_compile").iterdir()}
        assert not modules & set(fisedit_compile.__all__)


class TestLinkedFolders:
    """``passes/`` and ``kernels/`` stand at the top level and belong to the package all the same."""

    @pytest.mark.parametrize("folder", LINKED)
    def test_is_a_namespace_of_the_package(self, folder: str) -> None:
        package = import_module(f"fisedit_compile.{folder}")
        assert package.__file__ is None, f"{folder}/__init__.py makes the top-level folder a package of its own"
        assert {Path(entry).resolve() for entry in package.__path__} == {ROOT / folder}
        assert os.readlink(ROOT / "fisedit_compile" / folder) == f"../{folder}"

    @pytest.mark.parametrize("folder", LINKED)
    def test_an_installed_package_of_that_name_wins_in_the_repository_root(self, folder: str, tmp_path: Path) -> None:
        # "kernels" is a package of Hugging Face, which transformers and diffusers look for.
        installed = tmp_path / folder / "__init__.py"
        installed.parent.mkdir()
        installed.touch()
        assert run_python(f"import {folder}; print({folder}.__file__)", tmp_path) == [str(installed)]

    def test_folder_is_not_taken_for_hugging_face_kernels(self) -> None:
        # A name that is found without an installed distribution behind it must read as "not installed".
        code = (
            "import importlib.metadata as m, diffusers, transformers.utils as u\n"
            "from diffusers import StableDiffusionPipeline, UNet2DConditionModel\n"
            "from transformers import CLIPTextModel\n"
            "installed = any(d.name == 'kernels' for d in m.distributions())\n"
            "print(installed, u.is_kernels_available(), diffusers.utils.is_kernels_available())"
        )
        installed, transformers, diffusers = run_python(code)[-1].split()
        assert installed == "True" or (transformers, diffusers) == ("False", "False")

    def test_ruff_bans_the_bare_imports(self) -> None:
        pytest.importorskip("ruff")
        statements = ["import {}", "import {}.ops", "from {} import ops", "from {}.ops import x"]
        imports = [(folder, statement.format(folder)) for folder in LINKED for statement in statements]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise"),
                *("--stdin-filename", "tests/any.py", "-"),
            ],
            cwd=ROOT,
            input="".join(f"{statement}\n" for _, statement in imports),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        found = dict(re.findall(r"^tests/any\.py:(\d+):\d+: (.*)$", done.stdout, re.MULTILINE))
        for line, (folder, statement) in enumerate(imports, start=1):
            assert f"import fisedit_compile.{folder}" in found[str(line)], statement


def test_wheel_holds_the_linked_folders_as_files_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        sizes = {name: wheel.getinfo(name).file_size for name in names}
    assert {Path(name).parts[0] for name in names} == {"fisedit_compile"}
    sources = {f"fisedit_compile/{path.relative_to(ROOT)}": path for f in LINKED for path in (ROOT / f).rglob("*.py")}
    assert sources.keys() <= names
    assert all(sizes[name] == path.stat().st_size for name, path in sources.items())
    assert "fisedit_compile/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_library_speaks_through_logging_alone() -> None:
    """Printing is for the command line and the benchmarks, which are commands themselves."""
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("fisedit_compile", *LINKED)
        for path in (ROOT / folder).rglob("*.py")
        if not {"cli", "bench"} & set(path.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing
