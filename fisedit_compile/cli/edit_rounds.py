"""The options ``--edit`` and ``--then``: which pictures a run makes, and from which each is made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One edit of a run.

    Attributes:
        words: its prompt.
        further: whether it changes the picture of the edit before it, instead of the base's.
    """

    words: str
    further: bool


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Add ``--edit`` and ``--then``, whose order counts; ``changes`` of the arguments lists both."""
    parser.add_argument(
        "--edit",
        dest="changes",
        action="append",
        required=True,
        type=lambda words: Change(words, further=False),
        metavar="WORDS",
        help="the base's prompt with other words; give it again for another edit of the base",
    )
    parser.add_argument(
        "--then",
        dest="changes",
        action="append",
        type=lambda words: Change(words, further=True),
        metavar="WORDS",
        help="the words before it with other ones: changes the picture of the edit before it, any number of times",
    )


def check_changes(changes: Sequence[Change], prompt: str) -> None:
    """Hold the words of a run to those of the pictures that they change.

    Args:
        changes: in the order of the command line.
        prompt: of the base.

    Raises:
        ValueError: words that are those of the picture; ``--then`` without an edit before it.
    """
    for position, change in enumerate(changes):
        if not change.further:
            if change.words == prompt:
                raise ValueError(f"--edit is the same as --prompt ({prompt!r}): change at least one word")
        elif position == 0:
            raise ValueError(f"--then {change.words!r} changes the picture of an edit: give --edit before it")
        elif change.words == changes[position - 1].words:
            raise ValueError(f"--then is the same as the words before it ({change.words!r}): change at least one")
