"""Errors of our own: a graph, a base or a plan that cannot be used. Bad arguments raise ``ValueError``.

Every message says what was found, what is wanted and what to do.
"""

from __future__ import annotations


class FiseditError(RuntimeError):
    """Base of all errors of this package."""


class CaptureError(FiseditError):
    """The U-Net could not be captured as one graph, or is not a model that can be captured."""


class SparsifyError(FiseditError):
    """A pass found a graph that it cannot make mask-aware, or nothing at all to make sparse."""


class BaseMismatchError(FiseditError):
    """A base (a recorded generation) does not fit the model, scheduler, size or step it is used with."""


class MaskError(FiseditError, ValueError):
    """A mask that is empty, not finite, of the wrong shape or for another number of samples."""


class LargeMaskError(MaskError):
    """The mask that was found covers more of the picture than the edit was allowed to change."""


class BaseMemoryError(FiseditError, MemoryError):
    """A base would take more memory than is free; raised before its first step, or while a saved one is read."""


class PipelineInterruptedError(FiseditError):
    """A generation or an edit was stopped by ``pipe._interrupt``; nothing was kept of it, and it can be made again."""


class SavedBaseError(FiseditError):
    """A base cannot be saved, or what lies on disk cannot be used as one."""


class BaseFormatError(SavedBaseError):
    """A folder that is no saved base, or holds other things beside one."""


class BaseVersionError(BaseFormatError):
    """A saved base of a format that this version does not read."""


class DamagedBaseError(SavedBaseError):
    """A saved base whose files are not those that were written: cut short, changed, missing, or replaced by links."""


class BaseInUseError(SavedBaseError):
    """A saved base that somebody reads cannot be removed, and one that is being removed cannot be read."""


class BaseStorageError(SavedBaseError, OSError):
    """The file system refused to write, read or remove a base: it is full, read-only or forbidden."""
