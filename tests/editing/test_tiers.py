"""Where a base lies changes no bit of its edits."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import CONFIG, EDIT, generate, left_half, tiny_pipeline

import fisedit_compile.cache.file_checksum as file_checksum
import fisedit_compile.editing.record_run as record_run
from fisedit_compile import Base, Editor, EditRequest, SparsityConfig
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def made(tier: str, **options: Any) -> tuple[Editor, Base]:
    editor = Editor(tiny_pipeline().to("cuda", torch.float16), {**CONFIG, "tier": tier, **options})
    return editor, generate(editor, num_inference_steps=8)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["exact", "balanced", "small"])
def test_edits_from_host_memory_are_those_from_the_device(tmp_path: Path, cache: str) -> None:
    editor, base = made("device", cache=cache)
    other, away = made("host", cache=cache)
    assert (base.tier, away.tier) == ("device", "host")
    assert all(tensor.is_pinned() for call in away.calls for tensor in call.cache.values())
    away.save(tmp_path / "base")
    loaded = other.load(tmp_path / "base")
    assert loaded.tier == "host"
    assert all(tensor.is_pinned() for call in loaded.calls for tensor in call.cache.values())
    for mask, dense in ((left_half(), False), (None, False), (left_half(), True)):
        want = editor.edit(base, EDIT, mask, dense=dense)
        for each in (away, away, loaded, copy.deepcopy(away)):
            got = other.edit(each, EDIT, mask, dense=dense)
            assert torch.equal(got.latents, want.latents)
    again = [made_by.edit(made_by.edit(each, EDIT, left_half()), "a cat on the left", left_half())
             for made_by, each in ((editor, base), (other, away))]  # fmt: skip
    assert torch.equal(*(each.latents for each in again))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["exact", "balanced", "small"])
def test_edits_made_together_from_host_memory_and_the_device(cache: str) -> None:
    editor, base = made("device", cache=cache)
    other, away = made("host", cache=cache)
    second = generate(editor, "a dog on the apple", num_inference_steps=8, generator=torch.Generator().manual_seed(4))
    further = generate(other, "a dog on the apple", num_inference_steps=8, generator=torch.Generator().manual_seed(4))
    for masks in ((left_half(), ~left_half(), left_half()), (None, None, None), (None, left_half(), None)):
        prompts = (EDIT, "a cat on the apple", "an apple on the left")
        near, far = (
            [EditRequest(each, words, mask) for each, words, mask in zip(bases, prompts, masks, strict=True)]
            for bases in ((base, second, base), (away, further, away))
        )
        want = editor.edit_many(near)
        for _ in range(2):
            for one, other_one in zip(other.edit_many(far), want, strict=True):
                assert torch.equal(one.latents, other_one.latents)
        for request, edit in zip(near, want, strict=True):
            alone = editor.edit(request.base, request.prompt, request.mask)
            outside = ~edit.mask[:, None].expand_as(edit.latents)
            assert torch.equal(edit.latents[outside], request.base.latents[outside])
            if request.mask is not None:  # one that is found may be off by a cell, as latents round otherwise
                assert_close(edit.latents, alone.latents)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "host"])
def test_edits_begin_while_a_base_is_read(tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new editor captures its graphs meanwhile, which must not meet the copies of the reading threads.

    Each editor is held to itself: two of them may round otherwise (docs/decisions.md, 2026-11-28).
    """
    editor, base = made(tier)
    monkeypatch.setattr(file_checksum, "RANGE", 2**14)  # so that reading takes a while
    base.save(tmp_path / "base")
    for each in (editor, *(Editor(editor.pipe, editor.config) for _ in range(3))):
        loaded = each.load(tmp_path / "base")
        got = each.edit(loaded, EDIT, left_half()).latents
        assert torch.equal(got, each.edit(base, EDIT, left_half()).latents)
        assert loaded.tier == tier
        del loaded


@pytest.mark.gpu
def test_a_base_that_does_not_fit_on_the_device_lies_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fisedit_compile")
    monkeypatch.setattr(record_run, "free_bytes", lambda device: 1000 if device.type == "cuda" else 2**40)
    _, base = made("auto")
    assert base.tier == "host"
    assert "does not fit on cuda:0: it lies in host memory" in caplog.text


def test_on_a_cpu_there_is_one_place(tiny_base: Base) -> None:
    assert tiny_base.tier == "device"


@pytest.mark.parametrize(("field", "value"), [("tier", "disk"), ("cache", "tiny"), ("cache", 4)])
def test_unknown_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}: choose 'auto', "):
        SparsityConfig(**{field: value})
