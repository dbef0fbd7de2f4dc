"""Edits that are made together on a GPU, where what bases keep is brought beside each other by its kernels."""

from __future__ import annotations

import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, arguments, left_half, tiny_pipeline

from fisedit_compile import Edit, Editor, EditRequest

pytestmark = pytest.mark.gpu

APPLE = "an apple on the left"


@pytest.mark.parametrize("cache", ["exact", "balanced", "small"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_each_is_what_it_is_alone(cache: str, tier: str) -> None:
    pipe = tiny_pipeline().to("cuda", torch.float16)
    editor = Editor(pipe, {**CONFIG, "cache": cache, "tier": tier})

    def base(prompt: str, seed: int) -> object:
        return editor.generate(prompt, **{**arguments(), "generator": torch.Generator().manual_seed(seed)})

    bases = [base(PROMPT, 3), base(PROMPT, 4), base(EDIT, 5)]
    words = [EDIT, APPLE, PROMPT, APPLE]
    requests = [EditRequest(each, prompt, left_half()) for each, prompt in zip([*bases, bases[0]], words, strict=True)]
    for _ in range(2):  # the second time from addresses that are known
        for request, edit in zip(requests, editor.edit_many(requests), strict=True):
            alone = editor.edit(request.base, request.prompt, request.mask)
            assert isinstance(edit, Edit)
            assert torch.equal(edit.mask, alone.mask)
            assert (edit.latents - alone.latents).abs().max() < 0.05 * alone.latents.abs().max()
