"""The option ``--set``: any field of ``SparsityConfig``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, for :func:`config_fields`."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="other fields of SparsityConfig, such as stride=3",
    )


def config_fields(assignments: list[str]) -> dict[str, Any]:
    """Fields of a config from ``FIELD=VALUE``; a value is read as JSON where it is, else as text.

    Raises:
        ValueError: an assignment without ``=``, or a field that is given twice.
    """
    fields: dict[str, Any] = {}
    for each in assignments:
        name, equals, text = (part.strip() for part in each.partition("="))
        if not equals:
            raise ValueError(f"--set {each}: give FIELD=VALUE, for example stride=3")
        if name in fields:
            raise ValueError(f"--set {each}: {name} is given twice; leave one out")
        try:
            fields[name] = json.loads(text)
        except json.JSONDecodeError:
            fields[name] = text
    return fields
