"""What the tests do with deprecation warnings, by a library that warns as torch and diffusers do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.deprecations import MOST_BETWEEN

LIBRARY = """
import warnings

def old(category, stacklevel):
    warnings.warn("old is deprecated", category, stacklevel=stacklevel)

def through(calls, function):
    return through(calls - 1, function) if calls else function()
"""


@pytest.fixture
def library(tmp_path: Path) -> ModuleType:
    path = tmp_path / "library.py"
    path.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("library", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("stacklevel", [1, 2])
def test_a_call_of_ours_raises(library: ModuleType, category: type[Warning], stacklevel: int) -> None:
    with pytest.raises(category, match="old is deprecated"):
        library.old(category, stacklevel)


@pytest.mark.parametrize(("between", "raises"), [(MOST_BETWEEN, True), (MOST_BETWEEN + 1, False)])
def test_internals_of_a_library_are_passed_over(library: ModuleType, between: int, raises: bool) -> None:
    def call() -> None:
        library.through(between - 2, partial_of(library.old))

    if raises:
        with pytest.raises(FutureWarning):
            call()
    else:
        call()


def partial_of(function: Callable[..., None]) -> Callable[[], None]:
    """A call without a frame of its own, which would be one of this file."""
    from functools import partial

    return partial(function, FutureWarning, 2)


def test_other_warnings_are_shown(library: ModuleType) -> None:
    with pytest.warns(UserWarning, match="old"):
        library.old(UserWarning, 1)


def test_the_same_warning_raises_each_time(library: ModuleType) -> None:
    for _ in range(2):
        with pytest.raises(FutureWarning):
            library.old(FutureWarning, 1)
