"""The examples of edits run as they are printed, with tiny models of random weights and few steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.demo_pipelines import EXAMPLES, demo_pipeline

from fisedit_compile.bench.edit.random_pipeline import random_pipeline

SCRIPTS = sorted((EXAMPLES / "edits").glob("*.py"))
README = (EXAMPLES / "edits" / "README.md").read_text()

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_sdxl(*_: Any, **__: Any) -> Any:
    words = ("a photo of a cat on a wooden chair", "a photo of a dog on a wooden chair")
    return random_pipeline(
        "tiny-sdxl", size=128, words=words, scheduler="ddim", device=torch.device("cpu"), dtype=torch.float32
    )


def test_all_of_them_are_listed() -> None:
    assert sorted(re.findall(r"^\| \[(\w+\.py)\]", README, re.MULTILINE)) == [script.name for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *_, **__: demo_pipeline())
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", tiny_sdxl)
    code, replaced = re.subn(r"num_inference_steps=50\b", "num_inference_steps=6", script.read_text())
    assert replaced
    exec(compile(code, str(script), "exec"), {"__name__": "__main__"})
    assert list((tmp_path / "out" / "examples" / script.stem).glob("*.png"))
