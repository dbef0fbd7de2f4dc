"""fisedit_compile: make a diffusers U-Net mask-aware, so that an edit recomputes only the region that changes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisedit_compile.cache.store import BaseStore
    from fisedit_compile.config import SparsityConfig
    from fisedit_compile.editing.editor import Base, Edit, Editor, EditRequest
    from fisedit_compile.errors import (
        BaseFormatError,
        BaseInUseError,
        BaseMemoryError,
        BaseMismatchError,
        BaseStorageError,
        BaseVersionError,
        CaptureError,
        DamagedBaseError,
        FiseditError,
        LargeMaskError,
        MaskError,
        PipelineInterruptedError,
        SavedBaseError,
        SparsifyError,
    )
    from fisedit_compile.macs.counter import count_macs
    from fisedit_compile.sparse_unet import SparseUNet, sparsify

    __version__: str

#: Public name -> module. Loaded on first use (PEP 562), so that importing the package stays under 0.2 s.
_PUBLIC = {
    "SparsityConfig": "config",
    "Base": "editing.editor",
    "Edit": "editing.editor",
    "Editor": "editing.editor",
    "EditRequest": "editing.editor",
    "BaseFormatError": "errors",
    "BaseInUseError": "errors",
    "BaseMemoryError": "errors",
    "BaseMismatchError": "errors",
    "BaseStorageError": "errors",
    "BaseStore": "cache.store",
    "BaseVersionError": "errors",
    "CaptureError": "errors",
    "DamagedBaseError": "errors",
    "FiseditError": "errors",
    "LargeMaskError": "errors",
    "MaskError": "errors",
    "PipelineInterruptedError": "errors",
    "SavedBaseError": "errors",
    "SparsifyError": "errors",
    "count_macs": "macs.counter",
    "SparseUNet": "sparse_unet",
    "sparsify": "sparse_unet",
}

__all__ = [
    "Base",
    "BaseFormatError",
    "BaseInUseError",
    "BaseMemoryError",
    "BaseMismatchError",
    "BaseStorageError",
    "BaseStore",
    "BaseVersionError",
    "CaptureError",
    "DamagedBaseError",
    "Edit",
    "EditRequest",
    "Editor",
    "FiseditError",
    "LargeMaskError",
    "MaskError",
    "PipelineInterruptedError",
    "SavedBaseError",
    "SparseUNet",
    "SparsifyError",
    "SparsityConfig",
    "count_macs",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = import_module("importlib.metadata").version("fisedit-compile")
    elif name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
