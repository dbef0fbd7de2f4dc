"""One small pipeline for all tests of the editor that leave it as they found it: its U-Net is captured once."""

from __future__ import annotations

from typing import Any

import pytest
from support.pipelines import CONFIG, generate, tiny_pipeline

from fisedit_compile import Base, Editor


@pytest.fixture(scope="session")
def tiny_editor() -> Editor:
    return Editor(tiny_pipeline(), CONFIG)


@pytest.fixture(scope="session")
def tiny_base(tiny_editor: Editor) -> Base:
    return generate(tiny_editor)


@pytest.fixture
def tiny_pipe(tiny_editor: Editor) -> Any:
    """The pipeline of ``tiny_editor``."""
    return tiny_editor.pipe
