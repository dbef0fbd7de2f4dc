"""A saved base that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fisedit_compile import Base


@pytest.fixture(scope="module")
def saved_once(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, which is written once a module."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    tiny_base.save(folder)
    return folder


@pytest.fixture
def folder(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of it in a folder of its own, which a store can have."""
    shutil.copytree(saved_once, tmp_path / "store" / "base")
    return tmp_path / "store" / "base"
