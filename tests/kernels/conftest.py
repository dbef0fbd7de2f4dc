"""Triton's interpreter, without exchanging the functions of its language anew for each device function that is called.

That is half of the time of the tests that run in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def language_exchanged_once_a_launch() -> Iterator[None]:
    """Triton exchanges it for a launch, puts it back behind that, and exchanges it at each call on the way, too."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang
    exchanged: set[Any] = set()  # modules, in the launch that runs

    @cache
    def modules(function: Any) -> frozenset[Any]:
        return frozenset(
            each for each in (tl, tl.core) if any(each is found for found in function.__globals__.values())
        )

    class Launch:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            exchanged.clear()
            self.scope.restore()

    def once(function: Any) -> Any:
        if exchanged and modules(function) <= exchanged:
            return None  # what a call within a launch returns is not used
        scope = exchange(function) if exchanged else Launch(exchange(function))
        exchanged.update(modules(function))
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
