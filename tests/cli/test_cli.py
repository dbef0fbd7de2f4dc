"""The command line: edits with a very small pipeline, and what they are made of; benchmarks are in test_bench.py."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import structural_similarity
from support.pipelines import EDIT, PROMPT, tiny_pipeline

from fisedit_compile.cli import macs, main
from fisedit_compile.editing.overview import DIFFERENCE_GAIN, PANEL_SIDE, draw_overview, mask_picture
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.quality.ssim import ssim


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def edit(model: Path, out: Path, *options: str) -> int:
    return main(
        [
            "edit",
            "--model",
            str(model),
            "--prompt",
            PROMPT,
            "--edit",
            EDIT,
            "--steps",
            "4",
            "--device",
            "cpu",
            "--out",
            str(out),
            *options,
        ]
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def generated(model: Path, prompt: str, *, seed: int, **arguments: Any) -> np.ndarray:
    """What the plain pipeline draws."""
    pipe = load_pipeline(model, torch.device("cpu"), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, num_inference_steps=4, generator=generator, **arguments).images[0]).astype(int)


@pytest.fixture(scope="module")
def compared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, report and stdout of an edit with ``--compare-dense --json``."""
    out = tmp_path_factory.mktemp("compared") / "new" / "folder"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert edit(model, out, "--compare-dense", "--json", "--seed", "3", "--guidance", "2.5") == 0
    return out, json.loads((out / "report.json").read_text()), stdout.getvalue()


class TestEdit:
    def test_writes_all_files_and_no_others(self, compared: tuple[Path, dict[str, Any], str]) -> None:
        out, _, _ = compared
        names = {"base.png", "edit.png", "dense.png", "mask.png", "overview.png", "report.json"}
        assert {path.name for path in out.iterdir()} == names

    def test_pictures_are_those_of_the_pipeline(self, model: Path, compared: tuple[Path, dict[str, Any], str]) -> None:
        for name, prompt in (("base", PROMPT), ("dense", EDIT)):
            plain = generated(model, prompt, seed=3, guidance_scale=2.5)
            assert np.abs(pixels(compared[0] / f"{name}.png") - plain).max() <= 1

    def test_stdout_is_the_report_and_nothing_else(self, compared: tuple[Path, dict[str, Any], str]) -> None:
        assert json.loads(compared[2]) == compared[1]

    def test_figures_of_the_report_fit_each_other(self, compared: tuple[Path, dict[str, Any], str]) -> None:
        out, report, _ = compared
        mask = pixels(out / "mask.png")
        assert mask.shape == (32, 32)
        assert set(np.unique(mask)) <= {0, 255}
        assert report["mask_area"] == pytest.approx((mask == 255).mean())
        assert 0 < report["mask_area"] < 1
        assert (report["dense_steps"], report["sparse_steps"]) == (1, 3)
        macs, times = report["macs"], report["unet_ms"]
        assert macs["ratio"] == pytest.approx(macs["dense_step"] / macs["sparse_step"])
        assert (macs["dense_step"] > macs["sparse_step"] > 0) == (not report["ran_dense"])
        assert times["speedup"] == pytest.approx(times["dense_step"] / times["sparse_step"])
        assert times["dense_of"] == "plain"
        assert all(report["wall_seconds"][phase] > 0 for phase in ("base", "edit", "edit_dense"))
        assert report["capture_seconds"] > 0
        assert report["background_identical"] is True
        assert report["ssim_vs_dense"] == pytest.approx(
            ssim(Image.open(out / "edit.png"), Image.open(out / "dense.png"))
        )

    def test_report_says_what_was_run(self, compared: tuple[Path, dict[str, Any], str], model: Path) -> None:
        report = compared[1]
        said = {key: report[key] for key in ("model", "prompt", "edit", "seed", "steps", "guidance", "attention")}
        assert said == {
            "model": str(model),
            "prompt": PROMPT,
            "edit": EDIT,
            "seed": 3,
            "steps": 4,
            "guidance": 2.5,
            "attention": "full",
        }
        assert (report["device"], report["dtype"]) == ("cpu", "float32")
        assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert (report["removed_words"], report["added_words"]) == ([["cat"]], [["dog"]])
        assert report["mask_source"] == "found"

    def test_all_options_reach_the_pipeline_and_the_editor(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn = np.zeros((48, 32), np.uint8)
        drawn[8:20, 4:12] = 255
        Image.fromarray(drawn).save(tmp_path / "mask.png")
        out = tmp_path / "out"
        options = ["--mask", str(tmp_path / "mask.png"), "--attention", "masked", "--dense-steps", "0"]
        options += ["--height", "48", "--width", "32", "--seed", "1", "--negative-prompt", "an apple"]
        options += ["--background", "latents"]
        assert edit(model, out, *options) == 0
        plain = generated(model, PROMPT, seed=1, guidance_scale=7.5, height=48, width=32, negative_prompt="an apple")
        assert np.abs(pixels(out / "base.png") - plain).max() <= 1
        assert (pixels(out / "mask.png") == drawn).all()
        report = json.loads((out / "report.json").read_text())
        assert (report["mask_source"], report["dense_steps"], report["attention"]) == ("given", 0, "masked")
        assert (report["mask_area"], report["background"]) == (12 * 8 / (48 * 32), "latents")
        # Nothing dense ran, so nothing is said about it.
        assert report["wall_seconds"]["edit_dense"] is report["unet_ms"]["dense_step"] is None
        assert "ssim_vs_dense" not in report
        printed = capsys.readouterr().out
        assert "mask 6.2% of the picture (given)" in printed
        assert str(out) in printed


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--edit", PROMPT), "same as --prompt"),
            (("--model", "no/such/folder"), "no model_index.json"),
            (("--steps", "1"), "all 1 steps would run dense"),
            (("--dense-steps", "4"), "all 4 steps would run dense"),
            (("--dense-steps", "1.5"), "dense_steps=1.5"),
            (("--dense-steps", "0"), "give --mask"),
            (("--mask", "no/such/file.png"), "No such file"),
            (("--mask", __file__), "cannot identify image file"),
            (("--device", "tpu"), "choose auto, cpu, cuda"),
            (("--device", "cuda:99"), "use --device cpu"),
            (("--height", "33"), "height is 33 pixels"),
            (("--width", "35", "--height", "32"), "width is 35 pixels"),
        ],
    )
    def test_exits_with_2_and_a_reason(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], reason: str
    ) -> None:
        assert edit(model, tmp_path / "out", *options) == 2
        captured = capsys.readouterr()
        assert "fisedit-compile: error: " in captured.err
        assert reason in captured.err
        assert "Traceback" not in captured.err
        assert not captured.out
        assert not list(tmp_path.glob("out/*"))

    def test_mask_without_a_pixel(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Image.new("L", (32, 32)).save(tmp_path / "mask.png")
        assert edit(model, tmp_path / "out", "--mask", str(tmp_path / "mask.png")) == 2
        assert "no active pixel" in capsys.readouterr().err

    def test_pipeline_of_another_kind(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

        unet = UNet2DModel(
            8,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        )
        DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "model")
        assert edit(tmp_path / "model", tmp_path / "out") == 2
        assert "use a StableDiffusionPipeline" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["edit", "--prompt", PROMPT, "--edit", EDIT],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--steps", "0"],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--dense-steps", "some"],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--seed", str(2**64)],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--seed", "-1"],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--guidance", "nan"],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--guidance", "inf"],
            ["edit", "--model", ".", "--prompt", PROMPT, "--edit", EDIT, "--guidance", "much"],
            ["bench", "unet", "--edit-size", "15"],
            ["bench", "unet", "--attention", "sparse"],
        ],
    )
    def test_usage_errors(self, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exited:
            main(argv)
        assert exited.value.code == 2
        assert "error: " in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["blocks", "macs", "bench unet", "bench start"])
    def test_unknown_architectures(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*command.split(), "--arch", "nothing"]) == 2
        assert re.search(r"fisedit-compile: error: .*nothing.* sd15, sd2, sdxl$", capsys.readouterr().err.strip())


def test_what_the_library_logs_is_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("fisedit_compile.runtime.static_step")
    monkeypatch.setattr(macs, "run", lambda args: logger.info("compiling %s", "kernels"))
    for _ in range(2):
        assert main(["macs", "--arch", "tiny"]) == 0
        captured = capsys.readouterr()
        assert captured.err == "fisedit-compile: compiling kernels\n"
        assert not captured.out
    logger.info("not on the command line")
    assert not capsys.readouterr().err


class TestStart:
    def test_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys, fisedit_compile.cli as c; c.build_parser().format_help();"
            "print({'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"

    def test_module_is_the_command(self) -> None:
        done = subprocess.run([sys.executable, "-m", "fisedit_compile", "--version"], capture_output=True, text=True)
        assert done.stdout.startswith("fisedit-compile ")
        assert done.returncode == 0


class TestSsim:
    @given(st.integers(0, 2**32 - 1), st.integers(11, 40), st.integers(11, 40), st.sampled_from([None, 1, 3]))
    def test_is_that_of_scikit_image(self, seed: int, height: int, width: int, channels: int | None) -> None:
        random = np.random.default_rng(seed)
        shape = (height, width) if channels is None else (height, width, channels)
        first = random.integers(0, 256, shape, dtype=np.uint8)
        second = np.clip(first + random.normal(0, random.uniform(1, 80), shape), 0, 255).astype(np.uint8)
        expected = structural_similarity(
            first,
            second,
            channel_axis=None if channels is None else 2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ssim(first, second) == pytest.approx(expected, abs=1e-9)
        assert ssim(first / 255, second / 255) == pytest.approx(expected, abs=1e-9)

    def test_of_a_picture_with_itself_is_one(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        assert ssim(Image.fromarray(noise), noise) == 1

    @pytest.mark.parametrize(
        ("first", "second", "reason"),
        [((20, 20), (20, 21), "resize"), ((10, 30), (10, 30), "at least 11"), ((3,), (3,), "give")],
    )
    def test_bad_shapes(self, first: tuple[int, ...], second: tuple[int, ...], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            ssim(np.zeros(first), np.zeros(second))

    def test_integers_of_unknown_range(self) -> None:
        with pytest.raises(ValueError, match="uint8"):
            ssim(np.zeros((20, 20), np.int64), np.zeros((20, 20), np.int64))


class TestOverview:
    SIDE, MARGIN = 256, 12

    def panels(self, sheet: Image.Image, count: int = 4) -> list[np.ndarray]:
        array = np.asarray(sheet)
        lefts = [self.MARGIN + i * (self.SIDE + self.MARGIN) for i in range(count)]
        return [array[self.MARGIN : self.MARGIN + self.SIDE, left : left + self.SIDE] for left in lefts]

    def test_panels(self) -> None:
        base = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        edited, mask = base.copy(), np.zeros((64, 64), bool)
        mask[16:32, 8:16] = True
        edited[64:128, 32:64] ^= 15
        sheet = draw_overview(Image.fromarray(base), Image.fromarray(edited), mask, prompt=PROMPT, edit_prompt=EDIT)
        first, second, over, difference = self.panels(sheet)
        assert (first == base).all()
        assert (second == edited).all()
        inside = np.asarray(mask_picture(mask, (256, 256))) == 255
        grey = np.asarray(Image.fromarray(base).convert("L"))
        assert (over[~inside] == grey[~inside][:, None]).all()
        assert (over[inside] != grey[inside][:, None]).any(axis=1).mean() > 0.99
        assert (difference == DIFFERENCE_GAIN * np.abs(edited.astype(int) - base)).all()
        assert difference[inside].any()
        assert not difference[~inside].any()

    def test_caption_stays_under_its_panel(self) -> None:
        white = Image.new("RGB", (256, 256), "white")
        captions = ("word " * 200 + "x" * 300, "x" * 1000)
        mask = np.ones((4, 4), bool)
        long = draw_overview(white, white, mask, prompt=captions[0], edit_prompt=captions[1])
        assert long.height > draw_overview(white, white, mask, prompt="a", edit_prompt="b").height
        below = np.asarray(long)[self.MARGIN + self.SIDE :]
        gaps = [
            slice(self.MARGIN + i * (self.SIDE + self.MARGIN) - 6, self.MARGIN + i * (self.SIDE + self.MARGIN) - 2)
            for i in range(5)
        ]
        assert all((below[:, gap] == 255).all() for gap in gaps)
        assert (below[:, self.MARGIN : self.MARGIN + self.SIDE] < 128).any()

    @pytest.mark.parametrize(
        ("size", "panel"), [((64, 32), (256, 128)), ((400, 300), (400, 300)), ((768, 1024), (384, 512))]
    )
    def test_panels_have_a_readable_size(self, size: tuple[int, int], panel: tuple[int, int]) -> None:
        assert PANEL_SIDE == (256, 512)
        picture = Image.new("RGB", size)
        sheet = draw_overview(picture, picture, np.ones((4, 4), bool), prompt="a", edit_prompt="b")
        assert sheet.width == self.MARGIN + 4 * (panel[0] + self.MARGIN)
        assert panel[1] < sheet.height < panel[1] + 80

    def test_bad_input(self) -> None:
        small, large = Image.new("RGB", (32, 32)), Image.new("RGB", (64, 64))
        with pytest.raises(ValueError, match="of one size"):
            draw_overview(small, large, np.ones((4, 4), bool), prompt="a", edit_prompt="b")
        with pytest.raises(ValueError, match="one sample"):
            draw_overview(small, small, np.ones((1, 4, 4), bool), prompt="a", edit_prompt="b")
