"""Progress of a long command: lines on stderr with the seconds since it began."""

from __future__ import annotations

import sys
import time

_START = time.perf_counter()


def say(text: str) -> None:
    """Print one line; stdout stays free for results."""
    print(f"[{time.perf_counter() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)
