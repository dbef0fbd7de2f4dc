"""Removes saved bases, and what processes left that were killed while they wrote or removed one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fisedit_compile.cache.base_manifest import MANIFEST, OWN_FILES, PARTIAL, REMOVED
from fisedit_compile.cache.folder_lock import folder_lock
from fisedit_compile.errors import BaseFormatError, BaseInUseError, BaseStorageError, SavedBaseError

_LEFTOVER = re.compile(rf"\..+\.[0-9a-f]{{8}}({re.escape(PARTIAL)}|{re.escape(REMOVED)})")


def remove_base(folder: Path) -> None:
    """Remove a saved base, damaged or not; a folder that holds anything else is left alone.

    Raises:
        BaseFormatError: the folder is none of a base, or holds other files, too.
        BaseInUseError: somebody reads it.
        BaseStorageError: the file system refuses.
    """
    with _removable(folder):
        hidden = folder.parent / f".{folder.name}.{secrets.token_hex(4)}{REMOVED}"
        try:
            os.rename(folder, hidden)  # so that nobody meets a part of it
            shutil.rmtree(hidden)
        except OSError as error:
            raise BaseStorageError(
                f"{folder} could not be removed ({error.strerror}): check its permissions"
            ) from error


def why_kept(folder: Path) -> str:
    """Why a saved base cannot be removed now; empty if it can."""
    try:
        with _removable(folder):
            return ""
    except SavedBaseError as error:
        return str(error)


def remove_leftovers(parent: Path) -> list[str]:
    """Remove what killed processes left beside the bases in a folder; what is being written is left alone.

    Returns:
        The names of the hidden folders that were removed.
    """
    removed = []
    for name in sorted(os.listdir(parent)):
        path = parent / name
        if not _LEFTOVER.fullmatch(name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            with folder_lock(path, alone=True):
                if all(OWN_FILES.fullmatch(each) for each in os.listdir(path)):
                    shutil.rmtree(path)
                    removed.append(name)
        except (BaseFormatError, BaseInUseError):  # it has got its name meanwhile, or is being written
            continue
        except OSError as error:
            raise BaseStorageError(f"{path} could not be removed ({error.strerror}): check its permissions") from error
    return removed


@contextmanager
def _removable(folder: Path) -> Iterator[None]:
    """Within the context nobody uses the base, and nothing else lies in its folder."""
    with folder_lock(folder, alone=True):
        names = os.listdir(folder)
        if MANIFEST not in names or len(names) == 1:
            raise BaseFormatError(f"{folder} is no folder of a saved base: nothing was removed")
        if foreign := sorted(name for name in names if not OWN_FILES.fullmatch(name)):
            raise BaseFormatError(
                f"{folder} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''} beside a base: move "
                "that elsewhere first; nothing was removed"
            )
        yield
