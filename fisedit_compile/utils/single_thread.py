"""Small tensor operations on the host, without the threads that they do not need."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Within the context, torch's operations of this thread use one processor each; other threads are left alone.

    An operation on some ten thousand elements takes 50 us; shared among threads it is no faster, and where other
    programs keep the processors busy, each waits for the slowest of its threads for milliseconds.

    The number is set in OpenMP, which keeps one for each thread. ``torch.set_num_threads`` would also set the number
    with which every thread starts that is new to torch: one that starts meanwhile would stay at one processor. Where
    torch is built without OpenMP nothing is set, which costs time alone.
    """
    openmp = _openmp()
    threads = torch.get_num_threads()  # torch sets a new thread's number at this call, so it has to come first
    if openmp is None:
        yield
        return
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(threads)


@cache
def _openmp() -> Any:
    """The OpenMP library that torch is linked to, or None."""
    library = ctypes.CDLL(torch._C.__file__)  # a lookup in it searches the libraries that it was linked to
    return library if hasattr(library, "omp_set_num_threads") else None
