"""``fisedit-compile quality`` with a pipeline of random weights, and all that it refuses before it draws anything."""

from __future__ import annotations

import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.demo_pipelines import demo_pipeline
from support.pipelines import tiny_pipeline

from fisedit_compile.cli import main
from fisedit_compile.errors import MaskError
from fisedit_compile.quality.cases import Case, load_cases
from fisedit_compile.quality.judge import Judge, JudgeConfig
from fisedit_compile.quality.runs import CaseRun, CaseRunner

VARIANTS = ("dense_below=8", "dense_below=8,attention=masked")
OPTIONS = ("--cases", "2", "--steps", "6", "--control", "0", "0.5", "1")


def untrained_judge() -> Judge:
    from demo_world.edits import BACKGROUNDS, NAMES, windows
    from demo_world.vocabulary import ACCESSORIES, TINTABLE, TINTS

    torch.manual_seed(0)
    accessories = ("none", *ACCESSORIES)
    config = JudgeConfig((*NAMES, "other"), TINTS, accessories, BACKGROUNDS, TINTABLE, windows(), {"name": 0.02})
    return Judge(config, config.network())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo_pipeline().save_pretrained(folder)
    untrained_judge().save(folder / "judge")
    return folder


def quality(model: Path, *options: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(["quality", "--model", str(model), "--device", "cpu", *options])
        except SystemExit as ended:
            status = int(str(ended.code))
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def measured(
    model: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, Path]:
    """The JSON, stdout and page of two cases by two variants."""
    out = tmp_path_factory.mktemp("quality")
    options = [*OPTIONS, "--clip", str(clip_folder)]
    options += [part for variant in VARIANTS for part in ("--variant", variant)]
    status, stdout, stderr = quality(model, *options, "--json", str(out / "q.json"), "--html", str(out / "page"))
    assert status == 0, stderr
    return json.loads((out / "q.json").read_text()), stdout, out / "page"


def test_every_case_and_every_figure_is_in_the_json(measured: tuple[dict[str, Any], str, Path]) -> None:
    values = measured[0]
    assert [each["case"]["id"] for each in values["cases"]] == [case.id for case in load_cases("quick", 2)]
    for each in values["cases"]:
        assert set(each["variants"]) == set(VARIANTS)
        assert set(each["dense"]) == {"0.0", "0.5", "1.0"}
        for scores in each["variants"].values():
            assert scores["latents_equal"] is True
            assert scores["far_pixels_equal"] == 1.0
            assert 0 < scores["mask_area"] <= 1
            assert -1 <= scores["ssim_inside"] <= 1
            assert 0 < scores["clip"]["image_similarity"] <= 1 + 1e-6
        assert each["clip_best_dense"]["image_similarity"] > 0
    groups = values["summary"]["variants"][VARIANTS[0]]
    assert set(groups) == {"object", "colour", "small", "all"}
    both = [each["variants"][VARIANTS[0]]["ssim_to_best"] for each in values["cases"]]
    assert groups["all"]["ssim_to_best"] == pytest.approx(sum(both) / 2)
    follows = [each["variants"][VARIANTS[0]]["clip"]["follows"] for each in values["cases"]]
    assert groups["all"]["clip_follows"] == sum(follows) / 2
    assert set(values["summary"]["fid"]) == set(VARIANTS)
    assert all(distance >= 0 for distance in values["summary"]["fid"].values())
    assert values["steps"] == 6
    assert values["judge_accuracy"] == {"name": 0.02}


def test_variants_are_held_to_the_same_references(measured: tuple[dict[str, Any], str, Path]) -> None:
    """The mask is known before attention differs, so both have the same mask and the same dense edit under it."""
    for each in measured[0]["cases"]:
        full, masked = (each["variants"][name] for name in VARIANTS)
        assert full["mask"] == masked["mask"]
        assert full["seam_under_mask"] == masked["seam_under_mask"]
    configs = measured[0]["variants"]
    assert [configs[name]["attention"] for name in VARIANTS] == ["full", "masked"]


def test_stdout_is_the_tables(measured: tuple[dict[str, Any], str, Path]) -> None:
    values, stdout, _ = measured
    for name in VARIANTS:
        assert f"{name}: mask against" in stdout
        assert f"{name}: by CLIP" in stdout
    shown = values["summary"]["variants"][VARIANTS[0]]["all"]["ssim_inside"]
    assert f"{shown:.3f}" in stdout
    best = values["summary"]["best_control"]["object"]
    assert re.search(rf"object +{best:g} .* best", stdout)


def test_the_page_shows_pictures_that_are_there(measured: tuple[dict[str, Any], str, Path]) -> None:
    values, stdout, page = measured
    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                sources.append(str(dict(attrs)["src"]))

    text = (page / "index.html").read_text()
    Reader().feed(text)
    assert len(sources) == len(set(sources)) == 2 * (3 + 3 * len(VARIANTS))
    assert {Image.open(page / source).size for source in sources} == {(32, 32)}
    assert {path.name for path in (page / "pictures").iterdir()} == {Path(source).name for source in sources}
    assert all(each["case"]["prompt"] in text for each in values["cases"])
    assert str(page / "index.html") in stdout


def test_two_processes_draw_what_one_draws(
    model: Path, measured: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "two.json"
    status, _, stderr = quality(model, *OPTIONS, "--variant", VARIANTS[0], "--workers", "2", "--json", str(file))
    assert status == 0, stderr
    drawn = [
        [(each["case"]["id"], each["variants"][VARIANTS[0]]) for each in values["cases"]]
        for values in (measured[0], json.loads(file.read_text()))
    ]
    for (one, alone), (other, beside) in zip(*drawn, strict=True):  # processes with fewer threads may round otherwise
        assert one == other
        assert alone["mask"] == beside["mask"]
        assert alone["ssim_to_best"] == pytest.approx(beside["ssim_to_best"], abs=1e-3)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_case_that_cannot_be_edited_is_left_out_and_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    run, cases = CaseRunner.run, load_cases("quick", 2)

    def first_fails(self: CaseRunner, case: Case) -> CaseRun:
        if case in cases[:failing]:
            raise MaskError("there is no region to edit")
        return run(self, case)

    monkeypatch.setattr(CaseRunner, "run", first_fails)
    options = ("--cases", "2", "--steps", "4", "--control", "0", "--json", str(tmp_path / "q.json"))
    status, stdout, stderr = quality(model, *options)
    if failing == 2:
        assert status == 2
        assert f"no case could be edited: {cases[0].id}: there is no region to edit; {cases[1].id}" in stderr
        return
    assert status == 0, stderr
    values = json.loads((tmp_path / "q.json").read_text())
    assert values["failed"] == {cases[0].id: "there is no region to edit"}
    assert [each["case"]["id"] for each in values["cases"]] == [cases[1].id]
    assert f"left out, {cases[0].id}: there is no region to edit" in stdout


class TestRefusals:
    @pytest.fixture(autouse=True)
    def nothing_is_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def drawn(*_: Any) -> None:
            raise AssertionError("a case was drawn")

        monkeypatch.setattr(CaseRunner, "run", drawn)

    def refused(self, model: Path, *options: str) -> str:
        status, stdout, stderr = quality(model, *options)
        assert status == 2
        assert stdout == ""
        return stderr

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        assert "no folder of a diffusers pipeline" in self.refused(tmp_path)

    def test_a_model_without_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        assert "has no tokenizer" in self.refused(tmp_path)

    def test_a_model_with_another_vocabulary(self, tmp_path: Path) -> None:
        pipe = tiny_pipeline()
        pipe.tokenizer.model_max_length = 32
        pipe.save_pretrained(tmp_path)
        assert "tokenizer does not know" in self.refused(tmp_path)

    def test_a_model_without_a_judge(self, model: Path, tmp_path: Path) -> None:
        assert "examples/train_judge.py" in self.refused(model, "--judge", str(tmp_path))

    def test_a_model_of_other_pictures(self, model: Path, tmp_path: Path) -> None:
        pipe = demo_pipeline()
        pipe.unet.register_to_config(sample_size=(16, 24))
        pipe.save_pretrained(tmp_path)
        assert "the cases are square" in self.refused(tmp_path, "--judge", str(model / "judge"))

    def test_a_folder_that_is_no_clip(self, model: Path, tmp_path: Path) -> None:
        assert "no folder of a CLIP model" in self.refused(model, "--clip", str(tmp_path))

    def test_a_judge_of_other_things(self, model: Path, tmp_path: Path) -> None:
        judge = untrained_judge()
        known = JudgeConfig(**{**vars(judge.config), "backgrounds": ("green",)})
        Judge(known, known.network()).save(tmp_path)
        assert "the judge does not know" in self.refused(model, "--judge", str(tmp_path))

    def test_a_judge_whose_files_do_not_fit(self, model: Path, tmp_path: Path) -> None:
        untrained_judge().save(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, "names": ["cat"]}))
        assert "no judge that can be read" in self.refused(model, "--judge", str(tmp_path))

    def test_more_cases_than_there_are(self, model: Path) -> None:
        assert "give 1 to 20" in self.refused(model, "--cases", "21")

    def test_no_scheduler_of_diffusers(self, model: Path) -> None:
        assert "did you mean DDIMScheduler" in self.refused(model, "--scheduler", "DDIM")

    def test_no_cases(self, model: Path) -> None:
        assert "of at least 1" in self.refused(model, "--cases", "0")

    def test_a_page_that_cannot_be_written(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        assert "--html" in self.refused(model, "--html", str(tmp_path / "file" / "page"))
        assert (tmp_path / "file").read_text() == "kept"

    def test_a_json_that_cannot_be_written(self, model: Path, tmp_path: Path) -> None:
        assert "there is no folder" in self.refused(model, "--json", str(tmp_path / "none" / "q.json"))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (("--variant", "attention=wrong"), "choose 'full' or 'masked'"),
            (("--variant", "attention"), "no field and value"),
            (("--variant", "colour=1"), "unknown config field"),
            (("--variant", "dense_steps=0"), "0 of the 17 steps"),
            (("--variant", "dense_steps=17"), "17 of the 17 steps"),
            (("--variant", "stride=1", "--variant", "stride=1"), "given twice"),
            (("--variant", "stride=60"), "at most 49"),
            (("--control", "1.5"), "share of the steps"),
            (("--reference-stride", "50"), "fewer than the 50 steps"),
            (("--steps", "1"), "of at least 2"),
        ],
    )
    def test_options_that_cannot_be_measured(self, model: Path, options: tuple[str, ...], match: str) -> None:
        assert match in self.refused(model, *options)
