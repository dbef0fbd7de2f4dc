"""The file that ``--json`` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_json_path(path: Path | None) -> None:
    """Refuse a path that cannot be written before the minutes of measuring, not after them.

    Raises:
        ValueError: no such folder, or the path is a folder.
    """
    if path and not path.resolve().parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.resolve().parent}")
    if path and path.is_dir():
        raise ValueError(f"--json {path}: that is a folder; name a file in it")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write ``values``, or nothing without a path."""
    if path:
        path.write_text(json.dumps(values, indent=2) + "\n")
