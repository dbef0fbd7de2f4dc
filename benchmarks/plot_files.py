"""The command line of scripts that plot files of ``fisedit-compile bench ... --json``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 200  # twice the resolution of usual screens

#: What people call the models that ``--arch`` names.
MODELS = {"tiny": "tiny", "sd15": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL"}


def run(
    name: str,
    description: str,
    *,
    bench: str,
    keys: Collection[str],
    draw: Callable[[list[dict[str, Any]], Path], None],
    argv: list[str] | None,
) -> int:
    """Plot the files of a command line; returns 0, or 2 for a file that cannot be used.

    Args:
        name, description: of the script.
        bench: the command that writes such files, ``"bench unet"`` for example.
        keys: which all of its files have, beside ``rows``.
        draw: writes the picture of some files, in the format that the ending of its name says.
        argv: the command line; None is that of the process.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    help_of_files = f"of fisedit-compile {bench} --json"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help=help_of_files)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .svg, .png or .pdf")
    args = parser.parse_args(argv)
    try:
        results = [read_result(path, bench, keys) for path in args.files]
        if not args.out.resolve().parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no folder {args.out.resolve().parent}")
        draw(results, args.out)
    except (ValueError, OSError) as error:  # matplotlib raises the first for a format that it cannot write
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def read_result(path: Path, bench: str, keys: Collection[str]) -> dict[str, Any]:
    """The contents of a file; arguments as of :func:`run`.

    Raises:
        ValueError: the file is something else, or has no row.
    """
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(result, dict) or not {*keys, "rows"} <= result.keys() or not result["rows"]:
        raise ValueError(f"{path} is not of fisedit-compile {bench} --json, or has no rows")
    return result
