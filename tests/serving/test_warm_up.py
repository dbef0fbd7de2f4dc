"""Masks of which a replica makes the graphs before its first request: tests of ``fisedit_compile.serving.warm_up``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fisedit_compile.editing.running_edit import RIM
from fisedit_compile.masks.grown import grown
from fisedit_compile.planning.buckets import MASK_SHARES, RAGGEDNESS
from fisedit_compile.serving.warm_up import _masks

COMPACT, RAGGED = RAGGEDNESS["compact"], RAGGEDNESS["ragged"]


@pytest.mark.parametrize("latents", [64, 96, 128])
def test_there_is_a_compact_and_a_ragged_one_of_each_size(latents: int) -> None:
    """As the buckets tell them apart, by how much coarser levels enlarge them; the smallest are of one kind.

    What counts is what an edit computes, a cell more than its mask.
    """
    kinds: dict[str, set[float]] = {"compact": set(), "ragged": set()}
    for image in _masks(latents, "cuda", 0.5):
        region = grown(torch.from_numpy(np.asarray(image) > 0)[None], RIM)[0]
        assert region.shape == (latents, latents)
        mask = region.float()
        area = float(mask.mean())
        pooled = [float(F.max_pool2d(mask[None, None], 2**level).mean()) for level in (1, 2)]
        share = next(each for each in MASK_SHARES if area <= each)
        for kind, of in (("compact", COMPACT), ("ragged", RAGGED)):
            if all(part <= share * of.factor**level + of.summand * level for level, part in enumerate(pooled, 1)):
                kinds[kind].add(share)
                break
        else:
            raise AssertionError(f"neither compact nor ragged: {area}, {pooled}")
    assert kinds["compact"] == {share for share in MASK_SHARES if share <= 0.5}  # larger ones would run dense
    assert kinds["ragged"] >= {0.2, 0.25, 0.31, 0.5}


@pytest.mark.parametrize("latents", [8, 16, 32])
def test_those_of_small_pictures_are_of_some_pixels(latents: int) -> None:
    assert all(np.asarray(image).any() for image in _masks(latents, "cpu", 0.5))


def test_a_cpu_needs_two() -> None:
    masks = [torch.from_numpy(np.asarray(image) > 0)[None] for image in _masks(64, "cpu", 0.5)]
    assert [float(grown(mask, RIM).float().mean()) for mask in masks] == pytest.approx([0.01, 0.25], abs=0.003)
