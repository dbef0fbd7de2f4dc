"""Processes that write pictures and their bases into one folder; all are killed at some moment.

``python shared_library.py FOLDER PROCESSES SEED`` prints how many pictures are left and how many bases, as JSON, and
fails where index, pictures and bases disagree afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.packed import packed_base

from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.serving.held_bases import HeldBases, note_saved_bases, open_library, open_store
from fisedit_compile.serving.picture import BasePlace, Picture
from fisedit_compile.serving.picture_id import new_picture_id
from fisedit_compile.serving.request_index import RequestIndex
from fisedit_compile.serving.requests import Settings

WIDTH, ENCODER = 16, "encoder"
SETTINGS = Settings(8, 8, 4, 5.0)
KEY = SETTINGS.key("pipeline")


class Small:
    """A base without a model behind it."""

    nbytes = 1

    def pack(self) -> PackedBase:
        return packed_base(1, kib=16)


SIZE = Small().pack().nbytes


def embedding(name: str) -> np.ndarray:
    values = np.random.default_rng(int.from_bytes(name.encode()[-8:], "big")).standard_normal(WIDTH)
    return (values / np.linalg.norm(values)).astype(np.float32)


def picture(name: str | None = None, **changes: Any) -> Picture:
    name = name or new_picture_id()
    values: dict[str, Any] = {
        "id": name,
        "kind": "new",
        "prompt": f"words of {name}",
        "key": KEY,
        "pipeline": "pipeline",
        "route": name,
        "seed": 3,
        "settings": SETTINGS,
        "parent": None,
        "mask": None,
        "embedding": embedding(name),
        "encoder": ENCODER,
        "png": b"png",
        "pixels": f"of {name}",
        "seconds": 1.0,
        "reuse": {"kind": "none"},
        "report": {},
    }
    return Picture(**{**values, **changes})


def work(folder: Path, seed: int) -> None:
    """Write pictures and bases, and remove some, for as long as the process lives."""
    chance, library, store = random.Random(seed), open_library(folder), open_store(folder, 12 * SIZE)
    bases: Any = HeldBases(None, store, library, 4)  # type: ignore[arg-type]
    names: list[str] = []
    while True:
        if names and chance.random() < 0.2:
            name = names.pop(chance.randrange(len(names)))
            library.remove(name)
            bases.drop(name)
        else:
            made = picture()
            library.add(made)
            bases.add(made.id, Small())
            names.append(made.id)


def check(folder: Path) -> dict[str, int]:
    """A service starts: afterwards pictures, index and bases agree."""
    library, store = open_library(folder, check=True), open_store(folder, 12 * SIZE)
    store.evict()
    note_saved_bases(store, library, held=False)
    saved = {base.name for base in store.bases()}
    assert not [base.problem for base in store.bases() if base.problem]
    index = RequestIndex(library, ENCODER)
    assert len(index) == len(saved)
    for name in saved:
        made, found = library.get(name), index.nearest(KEY, embedding(name), 3, 0.99)
        assert made is not None
        assert made.base is BasePlace.SAVED
        assert found is not None
        assert (found.base, round(found.similarity, 5)) == (name, 1)
    return {"pictures": library.count(), "bases": len(saved)}


def main() -> None:
    folder, processes, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    chance, counts = random.Random(seed), {}
    for i in range(2):
        children = []
        for j in range(processes):
            child = os.fork()
            if child == 0:
                work(folder, seed + 100 * i + j)
            children.append(child)
        for child in children:
            time.sleep(chance.uniform(0.05, 0.4))
            os.kill(child, signal.SIGKILL)
        for child in children:
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL, f"a process ended with status {status}"
        counts = check(folder)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
