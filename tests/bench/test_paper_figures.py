"""Figures A2 and A3: every method edits a tiny model's pictures, in one process and in several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from support.demo_pipelines import EXAMPLES, demo_pipeline
from support.unets import MICRO

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import paper_figures  # noqa: E402
from baselines.inpainting import Inpainting  # noqa: E402
from baselines.prompt_to_prompt import PromptToPrompt  # noqa: E402
from baselines.task import Task  # noqa: E402
from baselines.text_to_image import TextToImage  # noqa: E402
from baselines.trained import TrainedKit  # noqa: E402
from tradeoffs.curves import CURVES, INSTRUCT, SIZES, settings_of  # noqa: E402
from tradeoffs.pictures import most_changed  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [name for name in CURVES if name != INSTRUCT]
PROMPT, EDIT = "a cat on the left", "a dog on the left"


def small_pipeline(**unet: Any) -> Any:
    """Two levels of three decoder layers each: the fifth layer is where Plug-and-Play begins."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(**{**MICRO, "layers_per_block": 2, **unet}).eval().requires_grad_(False)
    return demo_pipeline(unet=made)


def edits(method: Any, picture: Image.Image, **task: Any) -> np.ndarray[Any, Any]:
    method.steps = 4
    values = {"prompt": PROMPT, "words": EDIT, "picture": picture, "mask": None, "seed": 3, "guidance": 5.0}
    return np.asarray(method.edit(Task(**{**values, **task})))


def drawn(pipe: Any, words: str) -> Image.Image:
    generator = torch.Generator("cpu").manual_seed(3)
    picture: Image.Image = pipe(words, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0]
    return picture


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model, and a CLIP that was never trained."""
    from train_clip import build_clip, save

    folder = tmp_path_factory.mktemp("models")
    pipe = small_pipeline()
    pipe.save_pretrained(folder / "model")
    save(build_clip(pipe.tokenizer), pipe.tokenizer, folder / "clip")
    judge = EXAMPLES / "demo_model" / "judge"
    return [
        "--model",
        str(folder / "model"),
        "--clip",
        str(folder / "clip"),
        "--judge",
        str(judge),
        "--steps",
        "4",
        "--threads",
        "1",
    ]


@pytest.fixture(scope="module")
def measured(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON and the page of two cases by every method."""
    out = tmp_path_factory.mktemp("figures")
    given = ["--cases", "2", "--json", str(out / "figures.json"), "--html", str(out / "page")]
    assert paper_figures.main([*options, *given, "--device", "cpu"]) == 0
    return json.loads((out / "figures.json").read_text()), out / "page"


class TestMethods:
    def test_text_to_image_and_prompt_to_prompt_draw_from_the_noise_of_the_picture(self) -> None:
        pipe = small_pipeline()
        before, after = (drawn(pipe, words) for words in (PROMPT, EDIT))
        assert np.array_equal(edits(TextToImage(TrainedKit(pipe)), before), np.asarray(after))
        free = PromptToPrompt(TrainedKit(pipe))
        free.cross_share = 0.0
        free.takes_over = lambda cross, done: False  # type: ignore[method-assign]
        assert np.abs(edits(free, before).astype(int) - np.asarray(after)).max() <= 1
        whole = PromptToPrompt(TrainedKit(pipe))
        whole.cross_share = 1.0
        assert not np.array_equal(edits(whole, before), np.asarray(after))

    def test_inpainting_without_training_keeps_what_is_outside(self) -> None:
        pipe = small_pipeline()
        before = drawn(pipe, PROMPT)
        mask = Image.new("L", before.size)
        mask.paste(255, (0, 0, 8, 8))
        after = edits(Inpainting(TrainedKit(pipe), in_channels=4), before, mask=mask)
        difference = np.abs(after.astype(int) - np.asarray(before)).mean(-1)
        assert difference[:8, :8].mean() > difference[20:, 20:].mean()

    def test_a_model_that_was_not_trained_for_a_method_is_refused(self) -> None:
        with pytest.raises(ValueError, match="needs a U-Net of 9 input channels, and this model's has 4"):
            Inpainting(TrainedKit(small_pipeline()))

    def test_a_kit_leaves_the_pipeline_alone(self) -> None:
        pipe = small_pipeline()
        processors = {name: type(each) for name, each in pipe.unet.attn_processors.items()}
        edits(PromptToPrompt(TrainedKit(pipe)), drawn(pipe, PROMPT))
        assert {name: type(each) for name, each in pipe.unet.attn_processors.items()} == processors


class TestMasks:
    @pytest.mark.parametrize("share", SIZES)
    def test_the_cells_around_the_change_are_chosen_and_as_many_as_asked_for(self, share: float) -> None:
        before = torch.zeros(4, 32, 32)
        after = before.clone()
        after[:, 20:26, 4:10] = 1.0
        mask = most_changed(before, after, share)
        assert int(mask.sum()) == round(share * 32 * 32)
        assert mask[20:26, 4:10].all()

    def test_where_nothing_changes_there_is_one_all_the_same(self) -> None:
        assert int(most_changed(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8), 0.25).sum()) == 16


class TestFigures:
    def test_every_method_edits_every_case(self, measured: tuple[dict[str, Any], Path]) -> None:
        values, _ = measured
        assert values["failed"] == {}
        assert [row["method"] for row in values["summary"]] == [each.method for each in settings_of(METHODS)]
        assert len(values["figures"]) == 2 * len(values["summary"])
        for row in values["summary"]:
            assert (row["cases"], row["failed"]) == (2, 0)
            assert -1 <= row["directional_similarity"] <= 1
            assert -1 <= row["image_similarity"] <= 1.001
            assert min(row["fid_dense"], row["fid_rendered"]) >= -1e-6
            assert row["seconds"] > 0

    def test_calls_are_those_of_the_methods(self, measured: tuple[dict[str, Any], Path]) -> None:
        calls = {(row["method"], row["value"]): row["calls"] for row in measured[0]["summary"]}
        assert (calls["sdtp", None], calls["ppap", None], calls["pix2pix-zero", None]) == (4, 8, 16)
        assert (calls["sdedit", 0.5], calls["sdedit", 0.75], calls["diffedit", 1.0]) == (2, 3, 9)
        assert calls["fisedit-size", 0.25] == 4

    def test_edits_under_a_mask_are_all_different(self, measured: tuple[dict[str, Any], Path]) -> None:
        pictures = measured[1] / "pictures"
        for name in ("sdip", "fisedit-size"):
            found = [pictures / f"object-small-01.{name}-{size:g}.png" for size in SIZES]
            assert len({each.read_bytes() for each in found}) == len(SIZES)

    def test_the_page_shows_all_pictures_and_both_figures(self, measured: tuple[dict[str, Any], Path]) -> None:
        values, page = measured
        text = (page / "index.html").read_text()
        assert text.count("<img loading") == 2 * (3 + len(values["summary"]))
        assert {"A2.png", "A3.png"} <= {each.name for each in page.iterdir()}
        assert Image.open(page / "A3.png").width > 256 * (1 + len(METHODS))

    def test_the_table_is_printed_again(
        self, measured: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert paper_figures.main(["--table", str(measured[1].parent / "figures.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + len(settings_of(METHODS)) + 2
        assert lines[-1] == "left out: InstructPix2Pix"
        assert lines[2].startswith("| SDTP")

    def test_a_file_of_another_program_is_no_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "other.json").write_text("[]")
        assert paper_figures.main(["--table", str(tmp_path / "other.json")]) == 2
        assert "not a --json of this program" in capsys.readouterr().err

    def test_figures_are_drawn_again_from_the_file(self, measured: tuple[dict[str, Any], Path]) -> None:
        page = measured[1]
        before = {name: (page / name).read_bytes() for name in ("A2.png", "A3.png", "index.html")}
        for name in before:
            (page / name).unlink()
        assert paper_figures.main(["--table", str(page.parent / "figures.json"), "--html", str(page)]) == 0
        assert {name: (page / name).read_bytes() for name in before} == before

    def test_workers_find_what_one_process_finds(
        self, measured: tuple[dict[str, Any], Path], options: list[str], tmp_path: Path
    ) -> None:
        given = ["--cases", "2", "--workers", "2", "--timed", "1", "--json", str(tmp_path / "figures.json")]
        assert paper_figures.main([*options, *given, "--device", "cpu", "--methods", "fisedit"]) == 0
        found = json.loads((tmp_path / "figures.json").read_text())["summary"]
        alone = {(row["method"], row["value"]): row for row in measured[0]["summary"]}
        for row in found:
            other = alone[row["method"], row["value"]]
            assert row["seconds"] > 0
            for name in ("image_similarity", "psnr", "success", "calls"):
                assert row[name] == pytest.approx(other[name], abs=1e-4)

    def test_a_method_that_fails_leaves_the_others_alone(
        self, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its picture of an earlier run is not taken for one of this run."""
        old = tmp_path / "page" / "pictures" / "object-small-01.sdtp.png"
        old.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(old)

        def edit(self: TextToImage, task: Task) -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr(TextToImage, "edit", edit)
        given = ["--cases", "1", "--methods", "sdtp", "sdedit", "--json", str(tmp_path / "figures.json")]
        assert paper_figures.main([*options, *given, "--device", "cpu", "--html", str(tmp_path / "page")]) == 1
        rows = json.loads((tmp_path / "figures.json").read_text())["summary"]
        assert [row["failed"] for row in rows] == [1, *[0] * len(CURVES["sdedit"].values)]
        assert rows[0]["image_similarity"] is None
        assert "object-small-01: sdtp: RuntimeError: boom" in capsys.readouterr().out
        assert "RuntimeError: boom" in (tmp_path / "page" / "index.html").read_text()
        assert not old.exists()

    def test_instructions_need_a_model_of_their_own(
        self, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert paper_figures.main([*options, "--methods", INSTRUCT]) == 2
        assert "give --instruct DIR" in capsys.readouterr().err
        small_pipeline(in_channels=8).save_pretrained(tmp_path / "instruct")
        given = ["--cases", "1", "--methods", INSTRUCT, "--instruct", str(tmp_path / "instruct"), "--device", "cpu"]
        assert paper_figures.main([*options, *given]) == 0

    def test_a_folder_that_is_not_there(self, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert paper_figures.main([*options, "--json", "/nowhere/figures.json"]) == 2
        assert "there is no folder /nowhere" in capsys.readouterr().err
        assert paper_figures.main([*options, "--clip", "/nowhere"]) == 2
        assert "/nowhere is no folder of a CLIP model" in capsys.readouterr().err
