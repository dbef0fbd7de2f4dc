"""``fisedit-compile base``, and edits on the command line that take a saved base instead of generating one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import EDIT, PROMPT, tiny_pipeline

from fisedit_compile import Base, Editor
from fisedit_compile.cli import main
from fisedit_compile.utils.frozen_mapping import FrozenMapping

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ["--steps", "4", "--dense-steps", "2", "--seed", "3", "--guidance", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base of ``--save-base`` and what that edit wrote; no test writes there."""
    folder = tmp_path_factory.mktemp("drawn")
    argv = ["edit", "--model", str(model), "--prompt", PROMPT, "--edit", EDIT, *OPTIONS]
    assert main([*argv, "--save-base", str(folder / "bases" / "cat"), "--out", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def bases(drawn: Path, tmp_path: Path) -> Path:
    """A folder of bases of a test's own."""
    shutil.copytree(drawn / "bases", tmp_path / "bases")
    return tmp_path / "bases"


def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return values


class TestEditOfASavedBase:
    def test_draws_the_same_edit_and_no_base(
        self, model: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Editor, "generate", None)
        base = drawn / "bases" / "cat"
        argv = ["edit", "--model", str(model), "--base", str(base), "--edit", EDIT, "--out", str(tmp_path)]
        assert main([*argv, "--compare-dense"]) == 0
        for name in ("base", "edit", "mask", "overview"):
            assert (tmp_path / f"{name}.png").read_bytes() == (drawn / "out" / f"{name}.png").read_bytes()
        first, second = report(drawn / "out"), report(tmp_path)
        assert first["base"] == second["base"] == str(base)
        same = ("prompt", "edit", "steps", "guidance", "width", "height", "attention", "base_bytes", "dense_steps")
        assert [first[name] for name in same] == [second[name] for name in same]
        assert (first["seed"], second["seed"]) == (3, None)
        assert first["wall_seconds"]["base"] > 0
        assert first["wall_seconds"]["load"] is second["wall_seconds"]["base"] is None
        assert second["wall_seconds"]["load"] > 0
        assert second["wall_seconds"]["edit"] > 0
        noise = torch.Generator().manual_seed(3)
        plain = tiny_pipeline()(EDIT, num_inference_steps=4, guidance_scale=5.0, generator=noise).images[0]
        dense = np.asarray(Image.open(tmp_path / "dense.png")).astype(int)
        assert np.abs(dense - np.asarray(plain)).max() <= 1

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--edit", PROMPT], "--edit is the same as --prompt"),
            (["--steps", "4"], "--steps: the base in .* was generated with its own: leave that out"),
            (["--seed", "3", "--attention", "full"], "--seed, --attention: the base in"),
            (["--save-base", "other"], "is saved already: leave one of the two out"),
            (["--base", "no/such/base"], "no/such/base is no folder of a saved base: give one that"),
            (["--dtype", "bf16"], "the base was generated with another U-Net"),
        ],
    )
    def test_bad_input(
        self, model: Path, drawn: Path, tmp_path: Path, options: list[str], reason: str, capsys: Any
    ) -> None:
        argv = ["edit", "--model", str(model), "--base", str(drawn / "bases" / "cat"), "--edit", EDIT]
        assert main([*argv, "--out", str(tmp_path / "out"), *options]) == 2
        captured = capsys.readouterr()
        assert re.search(rf"^fisedit-compile: error: .*{reason}", captured.err, re.MULTILINE)
        assert not captured.out
        assert not list(tmp_path.glob("out/*"))

    def test_a_base_without_a_picture(
        self, model: Path, tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = FrozenMapping({**tiny_base.arguments, "output_type": "np"})
        replace(tiny_base, arguments=arguments).save(tmp_path / "array")
        argv = ["edit", "--model", str(model), "--base", str(tmp_path / "array"), "--edit", EDIT]
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2
        assert "array is no base of one picture: edit it from Python" in capsys.readouterr().err

    def test_neither_a_prompt_nor_a_base(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["edit", "--model", str(model), "--edit", EDIT]) == 2
        assert "give --prompt, --photo or --base" in capsys.readouterr().err

    def test_a_prompt_and_a_base(self, model: Path) -> None:
        with pytest.raises(SystemExit):
            main(["edit", "--model", str(model), "--edit", EDIT, "--prompt", PROMPT, "--base", "there"])

    def test_where_the_base_would_be_saved_is_asked_before_it_is_generated(
        self, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["edit", "--model", "no/model", "--prompt", PROMPT, "--edit", EDIT, *OPTIONS]
        assert main([*argv, "--out", str(tmp_path / "out"), "--save-base", str(bases / "cat")]) == 2
        assert "cat is there already: give another name" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestBase:
    def test_save_writes_what_an_edit_saves(self, model: Path, drawn: Path, tmp_path: Path, capsys: Any) -> None:
        argv = ["base", "save", str(tmp_path / "new" / "cat"), "--model", str(model), "--prompt", PROMPT, *OPTIONS]
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert PROMPT in printed
        editor = Editor(tiny_pipeline(sparse_decoder=True), {"dense_steps": 2})
        one, other = (editor.load(folder) for folder in (tmp_path / "new" / "cat", drawn / "bases" / "cat"))
        assert torch.equal(one.latents, other.latents)
        assert one.config == other.config
        assert main(argv) == 2
        assert "cat is there already" in capsys.readouterr().err

    def test_show(self, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["base", "show", str(bases / "cat")]) == 0
        printed = capsys.readouterr().out
        for words in (PROMPT, "StableDiffusionPipeline, DDIMScheduler", "1x4x16x16 float32 on cpu", "dense_steps=2"):
            assert words in printed
        (bases / "cat" / "note.txt").touch()
        assert main(["base", "show", str(bases / "cat")]) == 0
        assert "beside it, neither read nor removed: note.txt" in capsys.readouterr().out
        assert main(["base", "show", str(bases / "cat"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads((bases / "cat" / "manifest.json").read_text())

    def test_verify(self, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(bases / "cat", bases / "dog")
        assert main(["base", "verify", str(bases / "cat"), str(bases / "dog")]) == 0
        assert capsys.readouterr().out.count("intact") == 2
        shard = bases / "dog" / "call-0003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        assert main(["base", "verify", str(bases / "cat"), str(bases / "dog")]) == 2
        captured = capsys.readouterr()
        assert captured.out.count("intact") == 1
        assert "dog: call-0003.safetensors is not what was written: remove the folder" in captured.err

    def test_list_remove_and_prune(self, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("dog", "owl"):
            shutil.copytree(bases / "cat", bases / name)
        (bases / "dog" / "manifest.json").write_text("{}")
        (bases / "owl" / "manifest.json").write_text('{"format": "fisedit_compile base", "format_version": 1}')
        (bases / "notes").mkdir()
        assert main(["base", "list", str(bases)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["cat", "owl"]
        assert PROMPT in lines[1]
        assert "owl is of format 1, this version reads format 5" in lines[2]

        assert main(["base", "remove", str(bases / "owl"), str(bases / "notes")]) == 2
        captured = capsys.readouterr()
        assert captured.out == f"removed {bases / 'owl'}\n"
        assert "notes is no folder of a saved base: nothing was removed" in captured.err

        (bases / ".cat.01234567.partial").mkdir()
        assert main(["base", "prune", str(bases)]) == 0
        assert capsys.readouterr().out == f"removed {bases / '.cat.01234567.partial'}\n"
        assert main(["base", "prune", str(bases), "--max-gib", "1"]) == 0
        assert capsys.readouterr().out == "nothing to remove\n"
        assert main(["base", "prune", str(bases), "--max-gib", "0.001"]) == 0
        assert capsys.readouterr().out == f"removed {bases / 'cat'}\n"
        assert sorted(each.name for each in bases.iterdir()) == [".lock", "dog", "notes"]

    @pytest.mark.parametrize("what", ["show", "verify", "list", "remove", "prune"])
    def test_a_folder_that_is_not_there(self, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["base", what, str(tmp_path / "nothing")]) == 2
        assert "nothing" in capsys.readouterr().err
        assert not any(tmp_path.iterdir())
