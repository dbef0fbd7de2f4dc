"""The README: its snippets run as they are printed, and its figures are those of ``benchmarks/results``."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from fisedit_compile.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

#: What a snippet prints -> what runs here in its place, so that it takes seconds. Nothing else is changed.
SMALLER = {
    r"num_inference_steps=\d+": "num_inference_steps=4",
    r"(generate\(.*)num_inference_steps": r"\1height=64, width=64, num_inference_steps",
    r"--steps \d+": "--steps 4 --height 64 --width 64",
    r"1, (4, )?64, 64": r"1, \g<1>32, 32",
    r"--arch \w+ --size \d+": "--arch tiny --size 128",
    r"--edit-size( [\d.]+)+": "--edit-size 0.3",
    r"--baseline eager compile": "--baseline eager --repeats 1 --warmup 1 --device cpu",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def snippets(language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """The command lines of one program in shell blocks, without its name and without comments."""
    lines = [line for block in snippets("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("#")[0].partition(" ")[2].strip() for line in lines if line.partition(" ")[0] == program]


def smaller(text: str) -> str:
    for pattern, replacement in SMALLER.items():
        text = re.sub(pattern, replacement, text)
    return text


def run(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a snippet in a namespace of its own, or where another one left off, and return that."""
    names = {} if names is None else names
    exec(compile(smaller(code), "README.md", "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder in which the examples are found as in a checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestPython:
    def test_there_are_six_snippets(self) -> None:
        assert len(snippets("python")) == 6

    def test_the_editor_draws_the_edit(self, folder: Path) -> None:
        (code,) = [code for code in snippets("python") if "edit.image.save(" in code]
        names = run(code)
        assert (folder / "edit.png").exists()
        report = names["edit"].report
        assert (report.dense_steps, report.sparse_steps) == (1, 3)
        assert report.background_identical
        (code,) = [code for code in snippets("python") if "BaseStore(" in code]
        names = run(code, names)  # the one of bases on disk goes on with what is there
        assert [base.name for base in names["store"].bases()] == [names["name"]]
        assert torch.equal(names["edit_of_loaded"].latents, names["edit"].latents)
        (code,) = [code for code in snippets("python") if "editor.edit_many(" in code]
        names = run(code, names)
        assert torch.equal(names["dog"].mask, names["edit"].mask)
        assert names["pig"].report.background_identical
        (code,) = [code for code in snippets("python") if "editor.invert(" in code]
        names = run(code, names)
        assert names["base_of_photo"].image == names["photo"]
        assert names["edit_of_photo"].report.background_identical

    @pytest.mark.parametrize("call", ["unet.step(", 'backend="fisedit"'])
    def test_a_step_changes_what_the_mask_covers_alone(
        self, folder: Path, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Inductor compiles what runs outside both contexts of the backend, and the snippet makes no such call.
        monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph_module, inputs: graph_module)
        (code,) = [code for code in snippets("python") if call in code]
        names = run(code)
        changed = (names["noise"] != names["new_noise"]).any(dim=1)
        assert changed.any()
        assert not changed[~names["mask"]].any()
        assert torch.isfinite(names["new_noise"]).all()


class TestShell:
    def test_edit(self, folder: Path) -> None:
        first, second = [line for line in commands("fisedit-compile") if line.startswith("edit ")]
        assert main(shlex.split(smaller(first))) == 0
        report = json.loads((folder / "out" / "edit" / "report.json").read_text())
        assert (report["steps"], report["added_words"]) == (4, [["wearing", "a", "hat"]])
        assert main(shlex.split(smaller(second))) == 0
        report = json.loads((folder / "out" / "second" / "report.json").read_text())
        assert (report["base"], report["steps"], report["added_words"]) == ("out/bear", 4, [["cat"]])

    def test_others(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = [line for line in commands("fisedit-compile") if not line.startswith("edit ")]
        assert len(lines) == 2
        for line in lines:
            assert main(shlex.split(smaller(line))) == 0
            assert re.search(r"3[01]\.\d%", capsys.readouterr().out)  # the edit's size

    def test_the_command_is_installed_as_printed(self) -> None:
        (script,) = entry_points(group="console_scripts", name="fisedit-compile")
        assert script.load() is main

    def test_extras_that_pip_is_asked_for_exist(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        asked = {name for line in commands("pip") for name in re.findall(r"\[(.*?)\]", line)}
        assert asked
        assert asked <= project["optional-dependencies"].keys()

    def test_targets_of_make_exist(self) -> None:
        targets = commands("make")
        assert targets
        for target in targets:
            done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


class TestText:
    def test_order_of_the_headings(self) -> None:
        headings = ["Install", "Use", "Limits", "Figures", "How it works", "Development"]
        assert re.findall(r"^## (.*)$", README, re.MULTILINE) == headings

    def test_figures_are_those_of_the_results(self) -> None:
        figures = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
        assert figures["table"]() in README
        assert figures["headline"]() in " ".join(README.split())


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*/*.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(anchor_of, headings), link


def anchor_of(heading: str) -> str:
    """The name by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
