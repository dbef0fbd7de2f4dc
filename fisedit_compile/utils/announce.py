"""One line on what takes a while: through logging where a program has set that up, else on the terminal."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("fisedit_compile")


def announce(message: str) -> None:
    """Say what is being done that takes seconds and happens once."""
    if logger.hasHandlers():
        logger.info(message)
    else:
        print(f"fisedit_compile: {message}", file=sys.stderr, flush=True)
