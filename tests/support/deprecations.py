"""Deprecation warnings that our own calls bring about are errors; those of a library's internals are passed over.

A filter by module does not tell the two apart: torch attributes most of its warnings to the caller, diffusers to the
function of its own that warns. So the stack is read: our code has to be among the next few callers.
"""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("fisedit_compile", "passes", "kernels", "benchmarks", "examples", "tests")
_OURS = tuple(f"{ROOT / folder}/" for folder in _FOLDERS)

#: Functions of libraries that may lie between our call and the warning: diffusers' ``from_pretrained`` has four, with
#: its decorator and ``deprecate``. What is further away is how the library is built, not what we asked of it.
MOST_BETWEEN = 4

_KINDS = (DeprecationWarning, FutureWarning)


@contextmanager
def own_calls_raise() -> Iterator[None]:
    """Raise a deprecation warning where a call of ours brings it about, drop any other, and show other warnings."""
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, _KINDS):
            show(message, category, *where)
        elif _is_ours():
            raise message if isinstance(message, Warning) else category(message)

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = show


def _is_ours() -> bool:
    """Whether one of the callers next to ``warnings.warn`` is a file of this project.

    A warning that is raised in C has no such call: it is of the line of Python that runs, whoever that belongs to.
    """
    callers = walk_stack(sys._getframe(2))
    near = [frame for frame, _ in callers if frame.f_globals.get("__name__") != "warnings"][: MOST_BETWEEN + 1]
    if near and "warn" not in linecache.getline(near[0].f_code.co_filename, near[0].f_lineno):
        near = near[:1]
    return any(frame.f_code.co_filename.startswith(_OURS) for frame in near)
