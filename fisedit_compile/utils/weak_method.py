"""Bound methods that do not keep their object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])


def weakly(method: _Method) -> _Method:
    """A function that calls a bound method as long as somebody else keeps its object.

    So what an object has given its methods to does not form a circle with it, and all of it is freed at once.

    Raises:
        ReferenceError: when called later.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = reference()
        if bound is None:
            raise ReferenceError("this generation or edit has ended: call the pipeline that the editor was given")
        return bound(*args, **kwargs)

    return call  # type: ignore[return-value]
