"""A base that was saved and loaded gives the edits of the one in memory, and is held to the same pipeline."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from support.packed import forge_content
from support.pipelines import CONFIG, EDIT, PROMPT, generate, left_half, tiny_pipeline

from fisedit_compile import (
    Base,
    BaseFormatError,
    BaseMemoryError,
    BaseMismatchError,
    BaseStorageError,
    Editor,
    SavedBaseError,
)
from fisedit_compile.cache import memory
from fisedit_compile.cache.plain_form import from_plain, to_plain
from fisedit_compile.cache.shard_file import ALIGNMENT
from fisedit_compile.utils.frozen_mapping import FrozenMapping

pytestmark = pytest.mark.usefixtures("one_thread")


SKIPPING = {"stride": 2, "dense_steps": 0.5, "attention": "masked"}


@pytest.fixture(scope="module")
def folder(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the base of all tests lies; no test writes there."""
    folder = tmp_path_factory.mktemp("bases") / "cat"
    tiny_base.save(folder)
    return folder


def assert_same(one: Any, other: Any, path: str = "base") -> None:
    """Two values of the same kinds, bit for bit, however they are nested."""
    kinds = (Image.Image, FrozenMapping)
    assert type(one) is type(other) or any(isinstance(one, kind) and isinstance(other, kind) for kind in kinds), path
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape), path
        assert one.stride() == other.stride(), path
        assert one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes(), path
    elif isinstance(one, Image.Image):
        assert (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes()), path
    elif isinstance(one, (np.ndarray, np.generic)):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), path
    elif isinstance(one, (dict, FrozenMapping)):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(one, float):
        assert one == other or one != one, path
    else:
        assert one == other, path


def assert_same_base(one: Base, other: Base) -> None:
    plain = [each.name for each in fields(Base) if each.name not in ("calls", "decoded", "pipeline", "schedule")]
    for name in plain:
        assert_same(getattr(one, name), getattr(other, name), name)
    assert one.pipeline.difference(other.pipeline) == ""
    assert_same(one.pipeline.tokens, other.pipeline.tokens)
    assert one.schedule.difference(other.schedule) == ""
    decoded = [each.decoded for each in (one, other)]
    assert all(each is not None for each in decoded)
    assert_same(*(each.latents for each in decoded), "decoded")
    assert_same(*(dict(each.cache) for each in decoded), "decoded")
    assert [(call.step, call.cache.signature) for call in one.calls] == [
        (call.step, call.cache.signature) for call in other.calls
    ]
    for first, second in zip(one.calls, other.calls, strict=True):
        assert_same(dict(first.cache), dict(second.cache), f"step {first.step}")
        assert_same(first.cache.timesteps, second.cache.timesteps)


class TestSameBase:
    def test_everything_comes_back(self, tiny_editor: Editor, tiny_base: Base, folder: Path) -> None:
        assert_same_base(tiny_editor.load(folder), tiny_base)

    def test_edits_are_those_of_the_base_in_memory(self, tiny_editor: Editor, tiny_base: Base, folder: Path) -> None:
        loaded = tiny_editor.load(folder)
        for mask in (left_half(), None):
            want, got = (tiny_editor.edit(base, EDIT, mask) for base in (tiny_base, loaded))
            assert torch.equal(got.latents, want.latents)
            assert torch.equal(got.mask, want.mask)
            assert_same(got.images, want.images)

    def test_edits_of_another_base(self, tmp_path: Path) -> None:
        """This one has two pictures, skips steps, and was recorded with masked attention."""
        scheduler = EulerDiscreteScheduler(steps_offset=1)
        editor = Editor(tiny_pipeline(sparse_decoder=True, scheduler=scheduler), SKIPPING)
        base = generate(editor, num_inference_steps=8, num_images_per_prompt=2)
        assert base.solver_steps
        base.save(tmp_path / "base")
        loaded = editor.load(tmp_path / "base")
        assert_same_base(loaded, base)
        want, got = (editor.edit(each, EDIT, left_half()) for each in (base, loaded))
        assert torch.equal(got.latents, want.latents)
        assert_same(got.images, want.images)

    def test_another_pipeline_of_the_same_models(self, tiny_editor: Editor, tiny_base: Base, folder: Path) -> None:
        """What another process builds; that states of models are the same there is tested in test_model_state.py."""
        editor = Editor(tiny_pipeline(sparse_decoder=True), CONFIG)
        got = editor.edit(editor.load(folder), EDIT, left_half()).latents
        assert torch.equal(got, tiny_editor.edit(tiny_base, EDIT, left_half()).latents)

    def test_a_loaded_base_is_saved_again(
        self, tiny_editor: Editor, tiny_base: Base, folder: Path, tmp_path: Path
    ) -> None:
        tiny_editor.load(folder).save(tmp_path / "again")
        assert_same_base(tiny_editor.load(tmp_path / "again"), tiny_base)
        assert sorted(each.name for each in (tmp_path / "again").iterdir()) == sorted(
            each.name for each in folder.iterdir()
        )

    def test_arguments_that_are_no_plain_values(self, tiny_editor: Editor, tiny_base: Base, tmp_path: Path) -> None:
        noise = torch.randn(1, 4, 16, 16).to(memory_format=torch.channels_last)
        kept = {
            **tiny_base.arguments,
            "latents": noise,
            "image": [Image.effect_noise((5, 3), 9), Image.new("RGBA", (2, 2), (1, 2, 3, 4))],
            "array": np.arange(6, dtype=np.uint16).reshape(2, 3).T,
            "more": (
                {1: float("inf"), None: -0.0},
                np.float32(0.1),
                1e-300,
                2**70,
                "\ud800",
                b"\x00",
                1j,
                torch.float16,
            ),
        }
        base = replace(tiny_base, arguments=FrozenMapping(kept))
        base.save(tmp_path / "base")
        assert_same(tiny_editor.load(tmp_path / "base").arguments, base.arguments)

    def test_pictures_are_those_that_were_generated(self, tiny_editor: Editor, tiny_base: Base, tmp_path: Path) -> None:
        """What was drawn into the pictures of the base afterwards is not saved."""
        base = replace(tiny_base, images=[Image.new("RGB", tiny_base.image.size)])
        base.save(tmp_path / "base")
        loaded = tiny_editor.load(tmp_path / "base")
        assert_same(loaded.images, tiny_base.pictures)
        assert loaded.image is not loaded.pictures[0]


class TestFiles:
    def test_shards_are_step_major_and_begin_at_pages(self, tiny_base: Base, folder: Path) -> None:
        from safetensors import safe_open

        names = {each.name for each in folder.iterdir()}
        kept = [i for i, call in enumerate(tiny_base.calls) if call.cache]
        shards = {"base.safetensors", "decoder.safetensors", *(f"call-{i:04}.safetensors" for i in kept)}
        assert names == {"manifest.json", "base.json", *shards}
        for i in kept:
            path = folder / f"call-{i:04}.safetensors"
            with safe_open(path, "pt") as shard:
                assert set(shard.keys()) == {entry.name for entry in tiny_base.calls[i].cache}
            assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGNMENT == 0

    def test_the_estimate_of_its_size_is_close_and_no_less(self, tiny_base: Base, folder: Path) -> None:
        size = sum(each.stat().st_size for each in folder.iterdir())
        assert size <= tiny_base.pack().nbytes <= 1.3 * size

    def test_the_manifest_says_what_it_is(self, tiny_base: Base, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["format"], manifest["format_version"]) == ("fisedit_compile base", 5)
        assert manifest["summary"]["prompts"] == [PROMPT]
        assert manifest["summary"]["unet"] == tiny_base.pipeline.models["unet"].digest()
        # What pip says of a wheel may be without the build, "2.11.0" for example of "2.11.0+cu130".
        assert manifest["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (object(), r"arguments\['extra'\] is a builtins.object, which a saved base cannot hold"),
            (np.array(["a"]), r"arguments\['extra'\] is an array of <U1, which"),
            (np.array([object()]), r"arguments\['extra'\] is an array of object, which"),
            (Image.new("P", (2, 2)), r"arguments\['extra'\] is a picture of mode P, which .*convert\('RGB'\)"),
            (torch.zeros(2, 2).to_sparse(), r"arguments\['extra'\] is a tensor of torch.float32, torch.sparse_coo"),
            ([{"deep": {1, 2}}], r"arguments\['extra'\]\[0\]\['deep'\] is a builtins.set, which"),
        ],
        ids=["object", "words", "objects", "palette", "sparse", "nested"],
    )
    def test_what_cannot_be_kept_is_refused_by_name(
        self, tiny_base: Base, value: Any, message: str, tmp_path: Path
    ) -> None:
        base = replace(tiny_base, arguments=FrozenMapping({**tiny_base.arguments, "extra": value}))
        with pytest.raises(SavedBaseError, match=message):
            base.save(tmp_path / "base")
        assert not any(tmp_path.iterdir())

    def test_no_kind_of_value_is_looked_up(self) -> None:
        for form in ({"os.system": "true"}, {"dtype": "save"}, {"dict": 1, "list": 2}):
            with pytest.raises(ValueError, match="a"):
                from_plain(form, fetch=lambda reference: torch.zeros(1))
        with pytest.raises(SavedBaseError, match="words is a"):
            to_plain({"words": pytest}, "", keep=lambda tensor, path: None)


def exchanged(name: str) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        module = copy.deepcopy(getattr(pipe, name))
        next(module.parameters()).data.mul_(1.5)
        setattr(pipe, name, module)

    return change


def set_scheduler(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler()


class TestRefusal:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (set_scheduler, r"the scheduler is another one \(EulerDiscreteScheduler, not DDIMScheduler\)"),
            (exchanged("unet"), r"with another U-Net \(weights of conv_in\)"),
            (exchanged("vae"), r"with another vae \(weights of encoder.conv_in\)"),
            (lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4), r"with another U-Net \(FreeU: off -> on\)"),
            (lambda pipe: pipe.to(torch.float16), r"with another U-Net \(weights of .* more\)"),
        ],
        ids=["scheduler", "unet", "vae", "freeu", "dtype"],
    )
    def test_another_pipeline(self, folder: Path, change: Callable[[Any], None], message: str) -> None:
        pipe = tiny_pipeline(sparse_decoder=True)
        change(pipe)
        with pytest.raises(BaseMismatchError, match=message):
            Editor(pipe, CONFIG).load(folder)

    def test_what_is_changed_after_loading(self, tiny_editor: Editor, folder: Path) -> None:
        loaded, before = tiny_editor.load(folder), tiny_editor.pipe.vae
        try:
            exchanged("vae")(tiny_editor.pipe)
            with pytest.raises(BaseMismatchError, match=r"with another vae \(weights of"):
                tiny_editor.edit(loaded, EDIT, left_half())
        finally:
            tiny_editor.pipe.vae = before

    def test_another_class_of_pipeline(self, tiny_editor: Editor, tiny_base: Base, folder: Path) -> None:
        other = Editor(
            StableDiffusionImg2ImgPipeline(**tiny_editor.pipe.components, requires_safety_checker=False), CONFIG
        )
        message = r"with another pipeline \(StableDiffusionPipeline -> StableDiffusionImg2ImgPipeline\)"
        with pytest.raises(BaseMismatchError, match=message):
            other.load(folder)
        with pytest.raises(BaseMismatchError, match=message):
            other.edit(tiny_base, EDIT, left_half())

    def test_another_config(self, tiny_editor: Editor, folder: Path) -> None:
        with pytest.raises(BaseMismatchError, match=r"the base was kept for .*dense_steps=2.*this editor has"):
            Editor(tiny_editor.pipe, {**CONFIG, "dense_steps": 1}).load(folder)

    def test_other_versions(self, tiny_editor: Editor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from fisedit_compile.cache import base_manifest

        monkeypatch.setattr(base_manifest, "_version", lambda package: "99.0")
        with pytest.raises(
            BaseMismatchError, match=r"was saved with fisedit-compile .*, and this is fisedit-compile 99.0"
        ):
            tiny_editor.load(folder)

    @pytest.mark.parametrize("free", [0.0, 0.9])
    def test_no_room(
        self, tiny_editor: Editor, tiny_base: Base, folder: Path, free: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * tiny_base.nbytes))
        with pytest.raises(BaseMemoryError, match=r"would take 0\.0 GiB of cpu"):
            tiny_editor.load(folder)
        monkeypatch.setattr(memory, "free_bytes", lambda device: tiny_base.nbytes)
        assert tiny_editor.load(folder).nbytes == tiny_base.nbytes

    def test_noise_of_a_device_that_is_not_here(self, tiny_editor: Editor, tiny_base: Base, tmp_path: Path) -> None:
        """Noise of a generator there cannot be drawn again."""
        ((state, _),) = tiny_base.generators
        gone = torch.device("cuda", 99)
        replace(tiny_base, generators=((state, gone),)).save(tmp_path / "base")
        with pytest.raises(
            BaseMismatchError, match="noise of the base comes from a generator on cuda:99, which is not"
        ):
            tiny_editor.load(tmp_path / "base")

    def test_tensors_of_a_device_that_is_not_here_come_to_the_pipelines(
        self, tiny_editor: Editor, tiny_base: Base, folder: Path, tmp_path: Path
    ) -> None:
        def made_elsewhere(content: Any) -> None:
            if isinstance(content, dict) and "shard" in content:
                content["device"] = "cuda:99"
            for each in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
                made_elsewhere(each)

        shutil.copytree(folder, tmp_path / "base")
        forge_content(tmp_path / "base", made_elsewhere)
        assert (tmp_path / "base" / "base.json").read_text().count("cuda:99") > 100
        assert_same_base(tiny_editor.load(tmp_path / "base"), tiny_base)

    @pytest.mark.parametrize("where", ["nowhere", "empty", "file"])
    def test_no_base(self, tiny_editor: Editor, where: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(BaseFormatError, match=rf"{where} is no folder of a saved base"):
            tiny_editor.load(tmp_path / where)

    def test_what_lies_there_is_left_alone(self, tiny_base: Base, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        tiny_base.save(tmp_path / "empty")
        files = {each: each.read_bytes() for each in (tmp_path / "empty").iterdir()}
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        for name in ("empty", "file", "link"):
            with pytest.raises(SavedBaseError, match=f"{name} is there already: give another name"):
                tiny_base.save(tmp_path / name)
        with pytest.raises(BaseStorageError, match=r"file/base could not be written \((File exists|Not a directory)\)"):
            tiny_base.save(tmp_path / "file" / "base")
        assert {each: each.read_bytes() for each in (tmp_path / "empty").iterdir()} == files
        assert (tmp_path / "file").read_text() == "mine"
        assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "file", "link"]
