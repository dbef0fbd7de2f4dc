"""Small tensor operations on the host, without the threads that they do not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Operations of this thread use one processor each.

    An operation on some ten thousand elements takes 50 us; shared among threads it is no faster, and where other
    programs keep the processors busy, each waits for the slowest of its threads for milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
