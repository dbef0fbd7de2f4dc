"""A key of everything that decides a picture beside the arguments of the call that draws it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from fisedit_compile.cache.base_manifest import package_versions
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.pipeline_state import TOKENIZERS, PipelineState
from fisedit_compile.editing.schedule import Schedule


def pipeline_digest(pipe: Any, state: PipelineState, schedule: Schedule, config: SparsityConfig) -> str:
    """A hexadecimal key, the same in every process; weights that were not read before are read.

    Args:
        pipe: the pipeline.
        state: of its models.
        schedule: its scheduler, whose tables are left out: a call sets them.
        config: of the editor.
    """
    parts = {
        "kind": state.kind,
        "models": {name: model.digest() for name, model in state.models.items()},
        "words": {name: _words(tokenizer) for name in TOKENIZERS if (tokenizer := getattr(pipe, name, None))},
        "scheduler": [schedule.name, dict(schedule.config)],
        "config": asdict(config),
        "device": pipe.device.type,
        "versions": package_versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _words(tokenizer: Any) -> list[Any]:
    """What a tokenizer makes tokens of; how it does so is seen in the tokens of each prompt."""
    return [type(tokenizer).__name__, tokenizer.model_max_length, sorted(tokenizer.get_vocab().items())]
