"""Functions and classes as plain values: a name for what a library defines, the code itself for what a user does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from fisedit_compile.utils.libraries import is_library

#: Methods that decide what a module or an attention processor computes; patched in a library's class, they count.
_CALLED = ("forward", "__call__")

#: What Python itself writes into a class.
_WRITTEN_BY_PYTHON = frozenset(vars(type("Empty", (), {"__annotations__": {}}))) | {
    *("__annotate_func__", "__annotations_cache__", "__qualname__", "__static_attributes__", "__firstlineno__"),
    *("__abstractmethods__", "__parameters__", "__orig_bases__", "__slots__", "_abc_impl"),
}


def qualified_name(thing: Any) -> str:
    """``module.name`` of a class or function."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def code_digest(code: CodeType) -> str:
    """Stable across processes: instructions, names and constants, without file names and line numbers."""
    digest = hashlib.sha256()
    for part in _parts(code):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant))).encode()
        else:
            yield repr(constant).encode()


def global_names(code: CodeType) -> Iterator[str]:
    """Names that the code may look up in its module, those of nested functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from global_names(constant)


def members(cls: type) -> Iterator[tuple[type, str, Any]]:
    """``(class, name, value)`` of what decides the behaviour of an object of class ``cls``, its bases included.

    Of a user's class that is all that it defines; of a library's class the methods that are called.
    """
    for each in cls.__mro__:
        own = vars(each)
        names = _CALLED if is_library(each.__module__) else [name for name in own if name not in _WRITTEN_BY_PYTHON]
        for name in names:
            if name in own:
                yield each, name, own[name]


def functions_of(member: Any) -> Iterator[FunctionType]:
    """The Python functions behind a method, static method, class method or property."""
    candidates = (member, getattr(member, "__func__", None), *(getattr(member, n, None) for n in ("fget", "fset")))
    yield from (each for each in candidates if isinstance(each, FunctionType))
