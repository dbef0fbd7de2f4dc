"""Writes files that are whole or not there, whenever the command is stopped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file beside ``path``, and give it that name once it is whole.

    Args:
        path: of the file; one that is there already stays as it is until it is replaced.
        write: is given the path to write to; its suffix is that of ``path``.
    """
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
