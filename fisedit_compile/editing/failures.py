"""Which of several edits cannot be made, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fisedit_compile.errors import BaseMemoryError, FiseditError, PipelineInterruptedError


class Failures:
    """Errors of the edits of one call, each of which is of one edit alone.

    Args:
        edits: how many there are.
        kept: keep errors, so that the other edits are made; else they are raised, and name the edit where there are
            several.

    Attributes:
        errors: those that were kept, by the edit's place.
    """

    def __init__(self, edits: int, *, kept: bool) -> None:
        self.errors: dict[int, Exception] = {}
        self._edits, self._kept = edits, kept

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Within the context errors are of one edit, but for those that say nothing about it."""
        try:
            yield
        except (BaseMemoryError, PipelineInterruptedError):
            raise
        except (FiseditError, ValueError) as error:
            if self._kept:
                self.errors[index] = error
            elif self._edits == 1:
                raise
            else:
                raise type(error)(f"edit {index}: {error}") from error
