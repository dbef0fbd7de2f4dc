"""The option ``--json`` and the file that it names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fisedit_compile.cli.whole_file import write_whole


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and their conditions to FILE")


def check_json_path(path: Path | None) -> None:
    """Refuse a path that cannot be written; called before minutes of measuring rather than after them.

    Raises:
        ValueError: the path's folder does not exist, or the path is a folder.
    """
    if path and not path.resolve().parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.resolve().parent}")
    if path and path.is_dir():
        raise ValueError(f"--json {path}: that is a folder; name a file in it")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write ``values`` to ``path``; without a path do nothing."""
    if path:
        text = json.dumps(values, indent=2) + "\n"
        write_whole(path, lambda partial: partial.write_text(text))
