"""The benchmarks run: Table A1 with every method at a small size, and the analysis of masks."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as Python does for a script that lies there

import sparsity  # noqa: E402
import table_a1  # noqa: E402
from baselines.measure import OK  # noqa: E402
from baselines.plug_and_play import FIRST_LAYER, PlugAndPlay  # noqa: E402
from baselines.prompt_to_prompt import PromptToPrompt  # noqa: E402
from baselines.text_to_image import TextToImage  # noqa: E402

from fisedit_compile.macs.counter import MacCounter  # noqa: E402
from fisedit_compile.masks.sample_masks import square_mask  # noqa: E402
from fisedit_compile.testing import assert_close  # noqa: E402

SMALL = ["--arch", "tiny", "--size", "128"]
STEPS = 5
PACKAGES = {"deepcache": "DeepCache", "tome": "tomesd"}


@pytest.fixture(scope="module")
def masks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ragged masks of 16x16, one of them empty."""
    masks = np.random.default_rng(0).random((4, 16, 16)) < 0.1
    masks[2] = False
    path = tmp_path_factory.mktemp("masks") / "masks.npz"
    np.savez(path, masks=masks)
    return path


@pytest.fixture(scope="module")
def table(masks_file: Path) -> Any:
    """The JSON of one whole run on the CPU but for torch.compile, which takes minutes there; rows by name."""
    path = masks_file.parent / "table.json"
    names = [name for name in table_a1.NAMES if name != "compiled"]
    given = ["--device", "cpu", "--steps", str(STEPS), "--masks", str(masks_file), "--json", str(path)]
    assert table_a1.main([*SMALL, *given, "--methods", *names]) == 0
    result = json.loads(path.read_text())
    return {**result, "rows": {row["name"]: row for row in result["rows"]}}


@pytest.fixture(scope="module")
def counter() -> MacCounter:
    lowered = MacCounter.of("tiny", height=128, width=128).lowered
    return MacCounter(lowered, check=False)  # fvcore's second count is tests/macs/test_macs.py's


@pytest.fixture(scope="module")
def dense_macs(counter: MacCounter) -> int:
    return counter.dense.total


class TestTable:
    def test_every_method_ran_as_it_was_counted(self, table: Any) -> None:
        # A run whose calls are not those counted has another status.
        for name, row in table["rows"].items():
            missing = name in PACKAGES and find_spec(PACKAGES[name]) is None
            assert row["status"] == (f"not installed: pip install {PACKAGES[name]}" if missing else "ok"), name
            assert missing or min(row["seconds"], row["calls_per_second"]) > 0

    def test_calls_and_batches_are_those_of_the_papers(self, table: Any, dense_macs: int) -> None:
        # Calls, and MACs in calls of batch 1; convolutions of other input channels are counted as they are.
        expected = {"sdtp": (5, 10), "sdip": (5, 10), "ppap": (10, 5 + 15), "instruct-pix2pix": (5, 15)}
        expected.update({"sdedit": (4, 8), "diffedit": (1 + 4 + 4, 40 + 8 + 8)})
        for name, (calls, samples) in expected.items():
            row = table["rows"][name]
            assert row["calls"] == calls, name
            assert row["macs"] == pytest.approx(samples * dense_macs / 2, rel=1e-2), name
        assert table["rows"]["sdtp"]["macs"] == 5 * dense_macs

    def test_prompt_to_prompt_is_four_samples_and_the_exchange(self, table: Any, dense_macs: int) -> None:
        kinds = {kind["kind"]: kind["macs"] / kind["calls"] for kind in table["rows"]["prompt-to-prompt"]["kinds"]}
        plain = kinds.pop("batch 4")
        assert plain == 2 * dense_macs
        assert all(plain < macs < 1.1 * plain for macs in kinds.values())

    def test_gradients_are_counted(self, table: Any, dense_macs: int) -> None:
        kinds = {kind["kind"]: kind for kind in table["rows"]["pix2pix-zero"]["kinds"]}
        assert {kind: each["calls"] for kind, each in kinds.items()} == {
            "batch 1": STEPS,
            "batch 2": 2 * STEPS,
            "batch 2, with gradients": STEPS,
        }
        assert 1.8 * dense_macs < kinds["batch 2, with gradients"]["macs"] / STEPS < 3 * dense_macs

    def test_fisedit_counts_sparse_steps_alone(self, table: Any, counter: MacCounter) -> None:
        for name, share in (("fisedit-5", 0.05), ("fisedit-30", 0.30)):
            kinds = {kind["kind"]: kind for kind in table["rows"][name]["kinds"]}
            assert not any("dense" in kind for kind in kinds)
            sparse = kinds["batch 2, sparse"]
            assert sparse["calls"] == STEPS
            assert sparse["macs"] == STEPS * counter.step(counter.plan(square_mask(share, (16, 16)))).total

    def test_packages_to_take_instead_do_less(self, table: Any, dense_macs: int) -> None:
        for name in PACKAGES:
            if find_spec(PACKAGES[name]) is None:
                pytest.skip(f"{PACKAGES[name]} is not installed: pip install '.[bench]'")
        kinds = {kind["kind"]: kind for kind in table["rows"]["deepcache"]["kinds"]}
        assert {kind: each["calls"] for kind, each in kinds.items()} == {"batch 2, full": 2, "batch 2, shallow": 3}
        assert kinds["batch 2, full"]["macs"] == 2 * dense_macs
        assert kinds["batch 2, shallow"]["macs"] < 0.5 * dense_macs
        assert 0.5 * 5 * dense_macs < table["rows"]["tome"]["macs"] < 5 * dense_macs

    def test_real_masks_are_several_pictures(self, table: Any) -> None:
        row = table["rows"]["fisedit-real"]
        assert (row["images"], row["calls"]) == (3, STEPS)  # the empty mask is left out
        assert sum(kind["calls"] for kind in row["kinds"]) == 3 * STEPS

    def test_meta_counts_the_same_and_runs_nothing(self, table: Any, tmp_path: Path) -> None:
        path, names = tmp_path / "meta.json", ["sdtp", "sdip", "compiled"]
        given = ["--device", "meta", "--steps", str(STEPS), "--json", str(path), "--methods", *names]
        assert table_a1.main([*SMALL, *given]) == 0
        rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
        assert list(rows) == names
        for name, row in rows.items():
            assert row["status"] == "counted only"
            assert row["seconds"] is None
            assert row["macs"] == table["rows"]["sdtp" if name == "compiled" else name]["macs"]

    def test_nothing_ran_over(self, table: Any) -> None:
        assert all(row["finite"] for row in table["rows"].values() if row["status"] == OK)

    def test_a_failure_is_a_row_and_an_exit_status(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make(self: TextToImage) -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr(table_a1.SDEdit, "make", make)
        assert table_a1.main([*SMALL, "--device", "meta", "--steps", "3", "--methods", "sdedit", "sdtp"]) == 1
        out = capsys.readouterr().out
        assert "| failed: RuntimeError: boom |" in out
        assert "| SDTP (text to image) | no | no | 3 |" in out

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--arch", "sd3"], "arch is 'sd3': the methods of the table exist for tiny"),
            (["--arch", "sdxl"], "arch is 'sdxl'"),
            ([*SMALL[:2], "--size", "100"], "100 pixels"),
            ([*SMALL, "--device", "tpu"], "--device tpu"),
            ([*SMALL, "--methods", "fisedit-real"], "--masks FILE.npz"),
            ([*SMALL, "--methods", "paper", "fisedit-real"], "--masks FILE.npz"),
            ([*SMALL, "--masks", "no.npz"], "no.npz"),
            ([*SMALL, "--json", "no/such/folder.json"], "there is no folder"),
        ],
    )
    def test_bad_arguments_are_told(self, given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert table_a1.main(["--device", "meta", *given]) == 2
        assert message in capsys.readouterr().err


def small_kit(dtype: torch.dtype = torch.float32) -> Any:
    return table_a1.Kit("tiny", 128, torch.device("cpu"), dtype)


class TestOwnImplementations:
    """What the two methods that are written here take from the picture's own denoising, seen in what they make."""

    def test_prompt_to_prompt_keeps_the_source_as_it_would_be_alone(self) -> None:
        # Control flows from the source to its edit only, and changes the edit.
        method = PromptToPrompt(small_kit())
        method.run(3)
        kept = _final_latents(method.pipe, lambda: method.run(3))
        method.takes_over = lambda cross, done: False  # type: ignore[method-assign]
        free = _final_latents(method.pipe, lambda: method.run(3))
        torch.testing.assert_close(kept[0], free[0])
        assert not torch.allclose(kept[1], free[1])

    @pytest.mark.parametrize("method", [PromptToPrompt, PlugAndPlay])
    def test_they_run_in_half_precision(self, method: Any) -> None:
        made = method(small_kit(torch.bfloat16))
        assert torch.isfinite(_final_latents(made.pipe, lambda: made.run(3))).all()

    def test_plug_and_play_injects_until_its_shares_are_over(self) -> None:
        method = PlugAndPlay(small_kit())
        method.steps = 10
        kinds = [method.kind(index) for index in range(20)]
        assert kinds[:10] == ["inversion"] * 10
        assert kinds[10:] == ["features and self-attention injected"] * 5 + ["features injected"] * 3 + [""] * 2

    def test_plug_and_play_takes_features_from_the_first_sample(self) -> None:
        method = PlugAndPlay(small_kit())
        method.steps, method.done = 10, 7
        resnet = [each for block in method.pipe.unet.up_blocks for each in block.resnets][FIRST_LAYER]
        maps = torch.randn(3, resnet.conv2.in_channels, 4, 4)
        own = torch.nn.functional.conv2d(maps, resnet.conv2.weight, resnet.conv2.bias, padding=1)
        assert_close(resnet.conv2(maps), own[:1].expand_as(own))
        method.done = 8
        assert_close(resnet.conv2(maps), own)


def _final_latents(pipe: Any, run: Any) -> torch.Tensor:
    """The latents that a pipeline decodes."""
    seen: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **kwargs: (seen.append(z), decode(z, **kwargs))[1]
    try:
        run()
    finally:
        del pipe.vae.decode
    return seen[0]


class TestSparsity:
    def test_writes_picture_and_figures(
        self,
        masks_file: Path,
        counter: MacCounter,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(MacCounter, "of", lambda *args, **kwargs: counter)  # that of the same arguments, made once
        given = ["--masks", str(masks_file), *SMALL, "--out", str(tmp_path / "out")]
        assert sparsity.main(given) == 0
        result = json.loads((tmp_path / "out" / "sparsity.json").read_text())
        assert (tmp_path / "out" / "sparsity.png").stat().st_size > 10_000
        assert result["masks"] == {"source": "masks.npz", "used": 3, "empty": 1}
        assert "| 1x1 |" in capsys.readouterr().out
        shares = [result["active_share"]["16x16"][str(tile)]["mean"] for tile in (1, 2, 4, 8, 16)]
        assert shares == sorted(shares)
        assert shares[-1] == 1

    def test_pixel_exact_macs_are_the_mean_of_the_masks_counted_one_by_one(
        self, masks_file: Path, counter: MacCounter
    ) -> None:
        masks = sparsity.read_masks(masks_file)
        masks = masks[masks.flatten(1).any(1)]
        one_by_one = [counter.step(counter.plan(mask[None])).total for mask in masks]
        shares = sparsity.active_shares(masks, ["16x16", "8x8", "4x4"])
        steps = sparsity.macs_by_tile(counter, shares)
        assert sum(steps["1"].values()) == pytest.approx(sum(one_by_one) / len(one_by_one), rel=1e-12)
        assert sum(steps["dense"].values()) == counter.dense.total

    def test_no_active_mask_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        np.savez(tmp_path / "empty.npz", masks=np.zeros((2, 8, 8), dtype=bool))
        assert sparsity.main(["--masks", str(tmp_path / "empty.npz"), *SMALL]) == 2
        assert "none of the 2 masks" in capsys.readouterr().err
