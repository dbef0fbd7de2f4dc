"""Endless random scenes with tokenised captions, made by worker processes ahead of the training step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from .captions import sample_captioned_scene
from .models import MAX_TOKENS
from .renderer import SceneTensors, encode_scenes

EMPTY_SHARE = 0.1  # captions left empty, for classifier-free guidance

Batch = tuple[SceneTensors, torch.Tensor]


class SceneStream(IterableDataset[Batch]):
    """Batches of encoded scenes and token ids `[batch, 32]`; they repeat for a seed and number of workers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.batch = batch
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            pairs = [sample_captioned_scene(rng) for _ in range(self.batch)]
            captions = ["" if rng.random() < EMPTY_SHARE else caption for _, caption in pairs]
            yield encode_scenes([scene for scene, _ in pairs]), tokenise(self.tokenizer, captions)


def tokenise(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids `[batch, 32]`, padded as StableDiffusionPipeline pads them."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def scene_batches(tokenizer: PreTrainedTokenizerFast, batch: int, seed: int, workers: int) -> Iterator[Batch]:
    """The stream, ahead by a few batches and in pinned memory where there is a GPU."""
    loader = DataLoader(
        SceneStream(tokenizer, batch, seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
