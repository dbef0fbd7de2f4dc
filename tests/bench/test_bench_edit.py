"""``fisedit-compile bench edit`` on very small pipelines: what is measured, the file, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fisedit_compile.bench.edit.random_pipeline import SCHEDULERS, random_pipeline
from fisedit_compile.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("bench", "edit", "--arch", "tiny", "--size", "128", "--device", "cpu", "--repeats", "1", "--baseline", "none")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "edit.json"
    assert main([*SMALL, "--steps", "6", "--edit-size", "0.1", "0.3", "--set", "stride=2", "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_each_size_is_a_row_with_the_steps_that_its_edits_made(measured: dict[str, Any]) -> None:
    assert [row["edit_size"] for row in measured["rows"]] == [0.1, 0.3]
    assert {(row["dense_steps"], row["sparse_steps"]) for row in measured["rows"]} == {(0, 3)}  # masks are given
    assert all(row["dense_step_ms"] is None for row in measured["rows"])
    assert all(row["edit_ms"] > 3 * row["sparse_step_ms"] for row in measured["rows"])


def test_the_file_says_what_was_measured_and_how(measured: dict[str, Any]) -> None:
    assert measured["config"]["stride"] == 2
    assert (measured["arch"], measured["steps"], measured["scheduler"]) == ("tiny", 6, "ddim")
    assert measured["command"].startswith("fisedit-compile bench edit --arch tiny")
    assert measured.keys() >= {"plain_ms", "recording_ms", "parts_ms", "base_gib", "versions"}
    assert "compiled_ms" not in measured
    assert all({"decode_ms", "planned_decode_ms"} <= row.keys() for row in measured["rows"])


@pytest.mark.parametrize("arch", ["tiny", "tiny-sd15", "tiny-sdxl"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_random_pipeline_draws(arch: str, scheduler: str) -> None:
    device = torch.device("cpu")
    pipe = random_pipeline(arch, size=64, words=("a cat",), scheduler=scheduler, device=device, dtype=torch.float32)
    image = pipe("a cat", height=64, width=64, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "stride"), "--set stride: give FIELD=VALUE, for example stride=3"),
        (("--set", "strides=3"), "unknown config field(s) strides"),
        (("--set", "stride=0"), "stride=0: 'auto', or a number of steps, at least 1"),
        (("--arch", "nothing"), "--arch nothing: choose one of tiny"),
        (("--json", "no/such/folder/out.json"), "there is no folder"),
        (("--masks", "none.npz"), "none.npz"),
    ],
)
def test_bad_input(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err
