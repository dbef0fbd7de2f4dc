"""Names of pictures: whoever does not know one cannot guess it, and none of them is a path."""

from __future__ import annotations

import re
import secrets

_PATTERN = re.compile(r"p[A-Za-z0-9_-]{22}")  # a letter in front: names of bases begin with none of the marks


def new_picture_id() -> str:
    """128 random bits in letters, digits, ``-`` and ``_``."""
    return f"p{secrets.token_urlsafe(16)}"


def is_picture_id(text: str) -> bool:
    """Whether a text can be the name of a picture, whether or not there is one."""
    return _PATTERN.fullmatch(text) is not None
