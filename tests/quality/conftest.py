"""Small models that several tests of quality take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_tokenizers import byte_pairs
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights that knows a few words."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("clip"), byte_pairs()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    narrow = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**narrow, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**text, **narrow}, vision_config=vision, projection_dim=6))
    for part in (model, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})):
        part.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
