"""``fisedit-compile edit`` with several edits, rounds, photos, kept bases, schedulers, and what PNGs say."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import EDIT, PROMPT, tiny_pipeline

from fisedit_compile import Editor
from fisedit_compile.cli import build_parser, main
from fisedit_compile.cli.base_options import settle_base_options
from fisedit_compile.cli.kept_bases import base_name
from fisedit_compile.cli.png_text import parameters
from fisedit_compile.compiler import lower
from fisedit_compile.editing import plain_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ["--steps", "4", "--seed", "3", "--guidance", "5", "--device", "cpu"]
OTHER, FURTHER = "an apple on the left", "a dog on the right"
CONFIG = {"dense_above": 1.0}

#: How A1111 finds values in the last line of its text.
VALUES = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    Image.fromarray(np.repeat(np.array([[255, 0]], np.uint8), 16, axis=1)).resize((32, 32)).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def edit(model: Path | str, out: Path, *options: str) -> int:
    return main(["edit", "--model", str(model), "--out", str(out), *OPTIONS, *options])


def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return values


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def said(path: Path) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and values of a PNG, read as A1111 does."""
    *prompt, negative, last = Image.open(path).info["parameters"].split("\n")
    values = {name: json.loads(value) if value[:1] == '"' else value for name, value in VALUES.findall(last)}
    return "\n".join(prompt), negative.removeprefix("Negative prompt:").strip(), values


class TestSeveralEdits:
    @pytest.fixture(scope="class")
    def made(self, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("several")
        words = ["--edit", EDIT, "--then", FURTHER, "--edit", OTHER]
        assert edit(model, out, "--prompt", PROMPT, *words, "--set", "dense_above=1.0") == 0
        return out

    def test_files(self, made: Path) -> None:
        numbered = {f"{kind}-{number}.png" for kind in ("edit", "mask") for number in (1, 2, 3)}
        assert {path.name for path in made.iterdir()} == numbered | {"base.png", "overview.png", "report.json"}

    def test_each_is_the_edit_that_it_is_alone(self, made: Path) -> None:
        editor = Editor(tiny_pipeline(), CONFIG)
        noise = torch.Generator().manual_seed(3)
        base = editor.generate(PROMPT, num_inference_steps=4, guidance_scale=5.0, generator=noise)
        first, other = editor.edit(base, EDIT), editor.edit(base, OTHER)
        further = editor.edit(first, FURTHER)
        for number, expected in enumerate((first, further, other), start=1):
            assert np.abs(pixels(made / f"edit-{number}.png") - np.asarray(expected.image)).max() <= 1

    def test_report(self, made: Path) -> None:
        values = report(made)
        assert [each["edit"] for each in values["edits"]] == [EDIT, FURTHER, OTHER]
        assert [each["of"] for each in values["edits"]] == ["base", "edit-1.png", "base"]
        assert [each["removed_words"] for each in values["edits"]] == [[["cat"]], [["left"]], [["a", "cat"]]]
        assert ["rebase" in each["wall_seconds"] for each in values["edits"]] == [False, True, False]
        assert values["wall_seconds"]["base"] > 0
        assert (values["prompt"], values["seed"], values["scheduler"]) == (PROMPT, 3, "DDIMScheduler")

    def test_overview_has_a_row_for_each(self, made: Path, model: Path, tmp_path: Path) -> None:
        assert edit(model, tmp_path, "--prompt", PROMPT, "--edit", EDIT, "--set", "dense_above=1.0") == 0
        one, three = (Image.open(folder / "overview.png") for folder in (tmp_path, made))
        assert (three.width, three.height) == (one.width, 3 * one.height)


def test_pngs_say_what_a1111_reads(model: Path, tmp_path: Path) -> None:
    assert edit(model, tmp_path, "--prompt", PROMPT, "--edit", EDIT, "--negative", "an apple: red, or 'green'") == 0
    values = {"Steps": "4", "Sampler": "DDIM", "CFG scale": "5.0", "Seed": "3", "Size": "32x32", "Model": model.name}
    prompt, negative, found = said(tmp_path / "base.png")
    assert (prompt, negative) == (PROMPT, "an apple: red, or 'green'")
    assert values.items() <= found.items()
    prompt, negative, found = said(tmp_path / "edit.png")
    assert (prompt, negative) == (EDIT, "an apple: red, or 'green'")
    assert {**values, "Edit of": PROMPT}.items() <= found.items()
    assert "parameters" not in Image.open(tmp_path / "mask.png").info


def test_words_of_any_script_and_marks_survive() -> None:
    text = parameters("ein Bär,\nzwei Bären\u3042", None, {"Steps": 4, "Seed": None, "Edit of": 'a "cat": left, right'})
    assert text.split("\n")[:3] == ["ein Bär,", "zwei Bären\u3042", "Negative prompt: "]  # which ComfyUI looks for
    values = dict(VALUES.findall(text.split("\n")[-1]))
    assert values["Steps"] == "4"
    assert json.loads(values["Edit of"]) == 'a "cat": left, right'


class TestPhoto:
    OPTIONS = ("--steps", "4", "--guidance", "5", "--device", "cpu")

    def run(self, model: Path, out: Path, *options: str) -> int:
        return main(["edit", "--model", str(model), "--out", str(out), *self.OPTIONS, *options])

    def test_with_words(self, model: Path, photo: Path, tmp_path: Path) -> None:
        assert self.run(model, tmp_path / "out", "--photo", str(photo), "--prompt", PROMPT, "--edit", EDIT) == 0
        assert (pixels(tmp_path / "out" / "base.png") == pixels(photo)).all()
        values = report(tmp_path / "out")
        assert (values["photo"], values["seed"], values["removed_words"]) == (str(photo), None, [["cat"]])
        assert "Seed" not in said(tmp_path / "out" / "edit.png")[2]

    def test_without_words_a_mask_is_filled_in(self, model: Path, photo: Path, mask: Path, tmp_path: Path) -> None:
        words = ["--photo", str(photo), "--edit", EDIT, "--background", "latents"]
        assert self.run(model, tmp_path / "out", *words) == 2
        assert self.run(model, tmp_path / "out", *words, "--mask", str(mask)) == 0
        assert report(tmp_path / "out")["mask_source"] == "given"

    def test_a_part_of_a_large_one(self, model: Path, tmp_path: Path) -> None:
        colours = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / "photo.jpg", quality=95)
        words = ["--photo", str(tmp_path / "photo.jpg"), "--prompt", PROMPT, "--edit", EDIT]
        assert self.run(model, tmp_path / "out", *words) == 2
        box = ["--box", "51", "7", "96", "40", "--set", "dense_above=1.0", "--compare-dense"]
        assert self.run(model, tmp_path / "out", *words, *box) == 0
        pictures = {name: pixels(tmp_path / "out" / f"{name}.png") for name in ("base", "edit", "mask", "dense")}
        assert (pictures["base"] == pixels(tmp_path / "photo.jpg")).all()
        assert pictures["mask"].shape == pictures["edit"].shape[:2] == (90, 150)
        outside = np.ones((90, 150), bool)
        outside[7:40, 51:96] = False
        for name in ("edit", "dense"):
            assert (pictures[name][outside] == pictures["base"][outside]).all()
        assert not pictures["mask"][outside].any()
        assert pictures["mask"].any()

    def test_saved_as_a_base(self, model: Path, photo: Path, tmp_path: Path) -> None:
        base = tmp_path / "base"
        argv = ["base", "save", str(base), "--model", str(model), "--photo", str(photo), "--prompt", PROMPT]
        assert main([*argv, *self.OPTIONS]) == 0
        argv = ["edit", "--model", str(model), "--base", str(base), "--edit", EDIT, "--out", str(tmp_path / "out")]
        assert main(argv) == 0
        assert (pixels(tmp_path / "out" / "base.png") == pixels(photo)).all()
        assert "Seed" not in said(tmp_path / "out" / "base.png")[2]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--seed", "3"), "--seed: the photo decides it"),
            (("--height", "64", "--width", "64"), "--height, --width: the photo decides it"),
            (("--box", "0", "0", "40", "32"), "is no part of a picture of 32x32"),
            (("--photo", "no/such.png"), "No such file"),
            (("--photo", __file__), "no picture that can be read"),
            (("--scheduler", "EulerDiscreteScheduler"), "EulerDiscreteScheduler cannot be run backwards"),
        ],
    )
    def test_bad_input(
        self, model: Path, photo: Path, tmp_path: Path, options: tuple[str, ...], reason: str, capsys: Any
    ) -> None:
        words = ("--photo", str(photo), "--prompt", PROMPT, "--edit", EDIT)
        assert self.run(model, tmp_path / "out", *words, *options) == 2
        assert reason in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*"))


class TestKeptBases:
    def run(self, model: Path, folder: Path, *options: str) -> dict[str, Any]:
        words = ["--prompt", PROMPT, "--edit", EDIT, "--bases", str(folder / "bases")]
        assert edit(model, folder / "out", *words, *options) == 0
        return report(folder / "out")

    def test_a_base_is_found_again(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.run(model, tmp_path)
        picture = (tmp_path / "out" / "edit.png").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Editor, "generate", None)
            second = self.run(model, tmp_path)
        assert (tmp_path / "out" / "edit.png").read_bytes() == picture
        assert first["base"] == second["base"]
        assert Path(first["base"]).parent == tmp_path / "bases"
        assert second["wall_seconds"]["base"] is first["wall_seconds"]["load"] is None
        assert second["seed"] == 3

    def test_other_settings_are_another_base(self, model: Path, photo: Path) -> None:
        def name(*options: str, dtype: torch.dtype = torch.float32) -> str:
            words = ["--prompt", PROMPT, "--edit", EDIT]
            args = build_parser().parse_args(["edit", "--model", str(model), *words, *options])
            return base_name(args, settle_base_options(args), torch.device("cpu"), dtype)

        assert name() == name("--edit", OTHER) == name("--seed", "0", "--steps", "50") == name("--out", "elsewhere")
        others = [
            *(("--seed", "4"), ("--steps", "5"), ("--guidance", "5"), ("--height", "64"), ("--width", "64")),
            *(
                ("--negative", "an apple"),
                ("--prompt", OTHER),
                ("--scheduler", "LCMScheduler"),
                ("--photo", str(photo)),
            ),
            *(("--attention", "masked"), ("--dense-steps", "3"), ("--set", "stride=1"), ("--model", str(photo.parent))),
        ]
        names = {name(), name(dtype=torch.bfloat16), *(name(*options) for options in others)}
        assert len(names) == len(others) + 2

    def test_a_model_that_was_replaced_and_a_damaged_base(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipe = tiny_pipeline()
        pipe.save_pretrained(tmp_path / "model")
        first = self.run(tmp_path / "model", tmp_path)
        pipe.unet.conv_out.weight.data.mul_(1.5)
        pipe.save_pretrained(tmp_path / "model")
        second = self.run(tmp_path / "model", tmp_path)
        assert "is made again: the base was generated with another U-Net" in capsys.readouterr().err
        assert first["base"] == second["base"]
        assert second["wall_seconds"]["load"] is None
        (Path(first["base"]) / "base.safetensors").write_bytes(b"")
        assert self.run(tmp_path / "model", tmp_path)["wall_seconds"]["load"] is None
        assert "is made again: " in capsys.readouterr().err
        assert self.run(tmp_path / "model", tmp_path)["wall_seconds"]["load"] > 0

    def test_one_that_cannot_be_kept_is_edited(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        usage = type("usage", (), {"free": 0})
        monkeypatch.setattr("fisedit_compile.cache.write_base.shutil.disk_usage", lambda _: usage)
        assert self.run(model, tmp_path)["base"] is None
        assert "the base is not kept: " in capsys.readouterr().err


def test_a_single_step_needs_a_mask(model: Path, mask: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--prompt", PROMPT, "--edit", EDIT, "--steps", "1", "--guidance", "1"]
    assert edit(model, tmp_path / "out", *words) == 2
    assert "all 1 steps would run dense: raise --steps, or give --mask" in capsys.readouterr().err
    assert edit(model, tmp_path / "out", *words, "--mask", str(mask)) == 0
    assert report(tmp_path / "out")["sparse_steps"] == 1


class TestScheduler:
    @pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "LCMScheduler"])
    def test_is_made_of_the_pipeline_s_own(self, model: Path, tmp_path: Path, name: str) -> None:
        assert edit(model, tmp_path, "--prompt", PROMPT, "--edit", EDIT, "--scheduler", name) == 0
        kind = getattr(diffusers, name)
        plain = plain_pipeline.load_pipeline(model, torch.device("cpu"), torch.float32)
        plain.set_progress_bar_config(disable=True)
        plain.scheduler = kind.from_config(plain.scheduler.config)
        noise = torch.Generator().manual_seed(3)
        picture = plain(PROMPT, num_inference_steps=4, guidance_scale=5.0, generator=noise).images[0]
        assert np.abs(pixels(tmp_path / "base.png") - np.asarray(picture)).max() <= 1
        assert report(tmp_path)["scheduler"] == name

    def test_a_saved_base_settles_it(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--prompt", PROMPT, "--edit", EDIT, "--scheduler", "EulerDiscreteScheduler"]
        assert edit(model, tmp_path / "out", *words, "--save-base", str(tmp_path / "base")) == 0
        argv = ["edit", "--model", str(model), "--base", str(tmp_path / "base"), "--edit", EDIT]
        assert main([*argv, "--out", str(tmp_path / "again")]) == 0
        assert (pixels(tmp_path / "again" / "edit.png") == pixels(tmp_path / "out" / "edit.png")).all()
        assert main([*argv, "--scheduler", "EulerDiscreteScheduler"]) == 2
        assert "--scheduler: the base in" in capsys.readouterr().err


def test_a_model_whose_scheduler_no_other_can_stand_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline(scheduler=diffusers.EDMEulerScheduler()).save_pretrained(tmp_path / "model")
    words = ["--prompt", PROMPT, "--edit", EDIT, "--scheduler", "DDIMScheduler"]
    assert edit(tmp_path / "model", tmp_path / "out", *words) == 2
    assert "the model is drawn with EDMEulerScheduler, which no other can stand for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--scheduler", "DDIM"), "did you mean DDIMScheduler"),
        (("--scheduler", "dpmsolvermultistep"), "did you mean DPMSolverMultistepScheduler"),
        (("--scheduler", "FlowMatchEulerDiscreteScheduler"), "did you mean EulerDiscreteScheduler"),
        (("--scheduler", "EDMEulerScheduler"), "scheduler EDMEulerScheduler: .*Known are DDIMScheduler, "),
        (("--set", "atention=masked"), "unknown config field(s) atention.* did you mean attention"),
        (("--set", "stride=often"), "stride='often': 'auto', or a number"),
        (("--set", "compile=1"), "compile=1: True or False"),
        (("--set", "stride"), "--set stride: give FIELD=VALUE"),
        (("--set", "stride=2", "stride=3"), "stride is given twice"),
        (("--set", "attention=full", "--attention", "full"), "leave one of the two out"),
        (("--then", EDIT), "--then is the same as the words before it"),
        (("--edit", PROMPT), "--edit is the same as --prompt"),
        (("--model", "no-such-model"), "no model_index.json in it"),
    ],
)
def test_refused_before_anything_is_loaded(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    assert edit(model, tmp_path / "out", "--prompt", PROMPT, "--edit", EDIT, *options) == 2
    assert re.search(reason.replace("(", r"\(").replace(")", r"\)"), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_round_without_an_edit_before_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "--model", str(model), "--prompt", PROMPT, "--then", EDIT, "--edit", EDIT]) == 2
    assert "give --edit before it" in capsys.readouterr().err


def test_a_model_of_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> Any:
            asked.append((name, options["local_files_only"]))
            return tiny_pipeline()

    monkeypatch.setattr(diffusers, "DiffusionPipeline", Hub)
    monkeypatch.chdir(tmp_path)
    assert edit("somebody/tiny-diffusion", tmp_path / "out", "--prompt", PROMPT, "--edit", EDIT) == 0
    assert asked == [("somebody/tiny-diffusion", False)]
    assert said(tmp_path / "out" / "edit.png")[2]["Model"] == "tiny-diffusion"


def test_a_folder_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        plain_pipeline.load_pipeline("models/mine", torch.device("cpu"), torch.float32)


class TestInterrupts:
    WORDS = ("--prompt", PROMPT, "--edit", EDIT, "--edit", OTHER, "--set", "dense_above=1.0")

    def test_ctrl_c_leaves_whole_files(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save = Image.Image.save

        def stopped(self: Image.Image, path: Path, **options: Any) -> None:
            save(self, path, **options)
            if "edit-2" in path.name:
                path.write_bytes(path.read_bytes()[:100])
                raise KeyboardInterrupt

        (tmp_path / "edit-2.png").write_text("of an earlier run")
        monkeypatch.setattr(Image.Image, "save", stopped)
        assert edit(model, tmp_path, *self.WORDS) == 130
        names = {"base.png", "edit-1.png", "mask-1.png", "overview.png", "edit-2.png"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert (tmp_path / "edit-2.png").read_text() == "of an earlier run"
        for name in names - {"edit-2.png"}:
            Image.open(tmp_path / name).load()

    def test_a_signal(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import signal

        steps = diffusers.DDIMScheduler.step

        def stopped(*args: Any, **kwargs: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return steps(*args, **kwargs)

        assert threading.current_thread() is threading.main_thread()
        monkeypatch.setattr(diffusers.DDIMScheduler, "step", stopped)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            assert edit(model, tmp_path, *self.WORDS) == 130
        finally:
            signal.signal(signal.SIGINT, before)
        assert not list(tmp_path.iterdir())


def test_progress_says_what_happens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISEDIT_COMPILE_CACHE", "")
    monkeypatch.setattr(lower, "_kept", OrderedDict())
    words = ["--edit", EDIT, "--then", FURTHER]
    assert edit(model, tmp_path, "--prompt", PROMPT, *words, "--set", "dense_above=1.0") == 0
    shown = capsys.readouterr().err
    for what in (
        f"loading {model}",
        "capturing UNet2DConditionModel",
        "base: 100%",
        "edit 1 of 2: 100%",
        "record 2 of 2",
    ):
        assert what in shown


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["edit", "--help"])
    shown = capsys.readouterr().out
    assert shown.count("    fisedit-compile edit --model DIR") == 4
    for option in ("--photo", "--then", "--scheduler", "--set", "--bases", "--negative"):
        assert option in shown
