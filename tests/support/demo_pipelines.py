"""A pipeline of random weights that knows the words of the demo world."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support.pipelines import tiny_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


def demo_pipeline(**parts: Any) -> Any:
    """:func:`tiny_pipeline` with the demo model's tokenizer; ``parts`` replace its own."""
    from demo_world.models import MAX_TOKENS, build_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tiny_pipeline(tokenizer=tokenizer, text_encoder=CLIPTextModel(text).eval(), **parts)
