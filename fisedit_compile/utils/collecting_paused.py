"""Many objects made at once, without searching them for garbage again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_paused() -> Iterator[None]:
    """Within the context, Python frees by reference counts alone, in all threads.

    For a few seconds at most: a graph is a hundred thousand objects that refer to each other, and that stay. Every few
    hundred thousand of them Python would look through all objects of the process, most of which are torch's modules.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
