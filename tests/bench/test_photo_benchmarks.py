"""benchmarks/photos.py and benchmarks/pie_bench.py, with tiny models and a folder in PIE-Bench's form."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import EDIT, PROMPT, tiny_pipeline
from transformers import ViTConfig, ViTModel

from fisedit_compile.quality.cases import Case, load_cases
from fisedit_compile.quality.judge import Judge

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import photo_edits.cases  # noqa: E402
import photos  # noqa: E402
import pie_bench  # noqa: E402
from photo_edits.cases import rendered  # noqa: E402
from photo_edits.measure import PhotoCase, measure, table  # noqa: E402
from photo_edits.methods import METHODS, Settings  # noqa: E402
from photo_edits.structure import judge_features, structure_distance  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def photo(seed: int = 0, side: int = 32) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(ROOT / "examples" / "demo_model" / "judge")


class TestMask:
    def test_runs_are_row_by_row_and_the_rim_is_edited(self) -> None:
        mask = pie_bench.decode_mask([9, 3, 22, 1], 6, 7)
        expected = np.zeros((6, 7), bool)
        expected[1, 2:5] = expected[3, 1] = True
        expected[[0, -1]] = expected[:, [0, -1]] = True
        assert np.array_equal(mask, expected)

    def test_one_that_runs_beyond_the_end_is_cut(self) -> None:
        assert pie_bench.decode_mask([30, 1000], 6, 7)[5].all()

    @pytest.mark.parametrize("encoded", [[1], [-1, 3], [3, -1], [42, 1]])
    def test_bad_ones(self, encoded: list[int]) -> None:
        with pytest.raises(ValueError, match="a mask"):
            pie_bench.decode_mask(encoded, 6, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in PIE-Bench's form, of two photos."""
    folder = tmp_path_factory.mktemp("data")
    entries = {}
    for number in range(2):
        path = f"1_change_object_80/{number}.jpg"
        (folder / "annotation_images" / path).parent.mkdir(parents=True, exist_ok=True)
        photo(number, 40).save(folder / "annotation_images" / path)
        entries[f"{number:012}"] = {
            "image_path": path,
            "original_prompt": PROMPT.replace("cat", "[cat]"),
            "editing_prompt": EDIT.replace("dog", "[dog]"),
            "editing_instruction": "Change the cat to a dog",
            "editing_type_id": "1",
            "blended_word": "cat dog",
            "mask": [40 * 5 + 5, 10, 40 * 6 + 5, 10],
        }
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return folder


class TestPieBench:
    def test_reads_cases(self, data: Path) -> None:
        cases = list(pie_bench.read_cases(data, None))
        assert [case.id for case in cases] == ["000000000000", "000000000001"]
        assert (cases[0].prompt, cases[0].words) == (PROMPT, EDIT)
        assert not cases[0].background[5, 5:15].any()
        assert cases[0].background[10, 1:-1].all()

    def test_table(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny_pipeline().save_pretrained(tmp_path / "model")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        ViTModel(ViTConfig(**sizes, patch_size=32), add_pooling_layer=False).save_pretrained(tmp_path / "dino")
        argv = ["--data", str(data), "--model", str(tmp_path / "model"), "--dino", str(tmp_path / "dino")]
        options = ["--cases", "1", "--steps", "4", "--methods", "fisedit", "sdedit"]
        pie_bench.main(
            [*argv, *options, "--json", str(tmp_path / "out.json"), "--pictures", str(tmp_path / "pictures")]
        )
        printed = capsys.readouterr().out
        assert "| FISEdit " in printed
        assert "| SDEdit, strength 0.8 " in printed
        figures = json.loads((tmp_path / "out.json").read_text())["figures"]
        assert [each["method"] for each in figures] == ["FISEdit", "SDEdit, strength 0.8"]
        assert figures[0]["psnr"] >= figures[1]["psnr"]
        assert len(list((tmp_path / "pictures").glob("*.png"))) == 3

    def test_other_folders(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no folder of PIE-Bench, with its mapping_file\.json"):
            list(pie_bench.read_cases(tmp_path, None))
        (tmp_path / "mapping_file.json").write_text('{"0": {"image_path": "0.jpg"}}')
        with pytest.raises(ValueError, match=r"entry 0 of mapping_file\.json is not of PIE-Bench's form"):
            list(pie_bench.read_cases(tmp_path, None))


@pytest.mark.parametrize("name", METHODS)
def test_each_method_edits_and_leaves_the_pipeline_alone(name: str, judge: Judge) -> None:
    pipe = tiny_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    processors = [type(each) for each in pipe.unet.attn_processors.values()]
    background = torch.zeros(32, 32, dtype=torch.bool)
    background[:, 28:] = True
    case = PhotoCase("one", photo(), PROMPT, EDIT, background, lambda picture: {"success": 1.0})
    figures = measure(case, METHODS[name](pipe, Settings(4, 5.0)), judge_features(judge))
    assert figures.psnr is not None
    assert np.isfinite([figures.psnr, figures.structure, figures.seconds]).all()
    assert table([figures]).count("\n") == 2
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    assert [type(each) for each in pipe.unet.attn_processors.values()] == processors


class TestPhotos:
    def test_a_rendered_case(self, judge: Judge) -> None:
        seen: list[Any] = [rendered(case, judge) for case in load_cases("quick", 5)]
        cases = [case for case in seen if case is not None]
        assert len(cases) > 3  # the judge knows the renderer's pictures
        for case in cases:
            assert case.photo.size == (256, 256)
            assert case.judge(case.photo) == {"success": 0.0, "right": 0.0}
        shares = {case.id.split("-")[0]: float(case.background.float().mean()) for case in cases}
        assert shares["background"] < 0.5 < shares["object"] < 1

    def test_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def small(case: Case, judge: Judge) -> PhotoCase:
            return replace(whole(case, judge), photo=photo(), background=torch.ones(32, 32, dtype=torch.bool))

        whole: Any = rendered
        monkeypatch.setattr(photo_edits.cases, "rendered", small)  # as large as what the tiny model draws
        tiny_pipeline().save_pretrained(tmp_path / "model")
        judge = ROOT / "examples" / "demo_model" / "judge"
        argv = ["--model", str(tmp_path / "model"), "--judge", str(judge), "--cases", "2", "--steps", "3"]
        photos.main([*argv, "--methods", "fisedit", "--json", str(tmp_path / "out.json")])
        printed = capsys.readouterr().out
        assert "| FISEdit " in printed
        assert "times as long (medians)" in printed
        written = json.loads((tmp_path / "out.json").read_text())
        assert {each["case"] for each in written["base_seconds"]} == {each.id for each in load_cases("all", 2)}
        assert all(each["inverted"] > 0 and each["drawn"] > 0 for each in written["base_seconds"])
        assert {each["equal"] for each in written["figures"]} <= {1.0}  # a random model finds no words in a photo

    def test_structure_distance(self, judge: Judge) -> None:
        features = judge_features(judge)
        assert structure_distance(photo(side=64), photo(side=64), features) == 0
        assert structure_distance(photo(side=64), photo(1, side=64), features) > 0
