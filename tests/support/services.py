"""A service over the smallest pipeline, in this process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fisedit_compile import Editor
from fisedit_compile.serving.engine import Engine
from fisedit_compile.serving.front import SIMILAR, Front, FrontOptions
from fisedit_compile.serving.held_bases import HeldBases, open_library, open_store
from fisedit_compile.serving.requests import GenerationRequest, Settings
from fisedit_compile.serving.words import WordEncoder
from fisedit_compile.serving.worker import Worker

SETTINGS = Settings(width=32, height=32, steps=4, guidance=5.0)
CAT, DOG = "a cat on the left", "a dog on the left"


def request(prompt: str = CAT, seed: int | None = 3, **changes: Any) -> GenerationRequest:
    return GenerationRequest(prompt, changes.pop("settings", SETTINGS), seed, **changes)


class Service:
    """All parts of a service in one folder; another one of the same folder is what a second process has.

    Attributes:
        store, library, words, bases, engine, worker, front: its parts.
    """

    def __init__(
        self,
        folder: Path,
        editor: Editor,
        *,
        max_bytes: int = 2**30,
        memory: int = 2**30,
        batch: int = 1,
        records: bool = True,
        similar: float = SIMILAR,
        **options: Any,
    ) -> None:
        self.store, self.library = open_store(folder, max_bytes), open_library(folder)
        self.words = WordEncoder(*copy.deepcopy((editor.pipe.tokenizer, editor.pipe.text_encoder)))
        self.bases = HeldBases(editor, self.store, self.library, memory, write=records)
        self.engine = Engine(editor, self.bases, self.library, records=records)
        self.worker = Worker(self.engine, batch)
        limits = FrontOptions(similar=similar, similar_of_seed=similar, **options)
        self.front = Front(self.library, self.store, self.words, self.engine.pipeline, self.worker, limits)

    def close(self) -> None:
        self.worker.close()
        self.library.close()

    def names(self) -> set[str]:
        """Of the bases in the store, when all are written."""
        self.bases.wait()
        return {base.name for base in self.store.bases()}


@contextmanager
def service(folder: Path, editor: Editor, **options: Any) -> Iterator[Service]:
    made = Service(folder, editor, **options)
    try:
        yield made
    finally:
        made.close()
