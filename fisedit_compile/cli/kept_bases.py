"""The option ``--bases``: a folder in which bases are kept, and found again by their settings."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisedit_compile.cache.base_manifest import package_versions
from fisedit_compile.cache.store import BaseStore
from fisedit_compile.errors import BaseFormatError, BaseMismatchError, DamagedBaseError, SavedBaseError

if TYPE_CHECKING:
    from fisedit_compile.config import SparsityConfig
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor

logger = logging.getLogger(__name__)

#: Arguments of the command that decide a base, beside the model, the photo, the config, the device and the dtype.
_SETTINGS = ("box", "prompt", "negative_prompt", "scheduler", "steps", "seed", "guidance", "height", "width")


class KeptBases:
    """Bases in a folder, each named after a checksum of all settings that it was made with.

    Whether a model is still what it was then is not in the name: ``Editor.load`` holds a base to the pipeline.

    Args:
        folder: where the bases lie; there is no limit to what they take (``fisedit-compile base prune`` sets one).

    Raises:
        BaseStorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._store = BaseStore(folder, sys.maxsize)

    def folder_of(self, name: str) -> Path:
        """Where the base of a name lies, if it is there."""
        return self._store.folder / name

    def find(self, editor: Editor, name: str) -> Base | None:
        """The base of a name, loaded; None if there is none that fits the pipeline, whatever the reason."""
        if not self.folder_of(name).exists():
            return None
        try:
            with self._store.get(name) as folder:
                logger.info("loading the base %s ...", folder)
                base = editor.load(folder)
                base.wait()  # so that a damaged one is made again
                return base
        except (BaseFormatError, BaseMismatchError, DamagedBaseError) as error:
            logger.warning("the base %s is made again: %s", name, error)
        try:
            self._store.remove(name)
        except SavedBaseError as error:
            logger.warning("the base %s stays: %s", name, error)
        return None

    def keep(self, base: Base, name: str) -> Path | None:
        """Save a base under a name, and return where; None, with a warning, where that is not possible."""
        try:
            self._store.put(base, name)
        except SavedBaseError as error:  # somebody else was faster, or the disk is full: there is a base in memory
            logger.warning("the base is not kept: %s", error)
            return None
        return self.folder_of(name)


def base_name(args: argparse.Namespace, config: SparsityConfig, device: Any, dtype: Any) -> str:
    """A name for the base of a command whose options are settled: another one where any setting is another one.

    Raises:
        OSError: the photo cannot be read.
    """
    model = Path(args.model)
    settings = {
        "model": str(model.resolve()) if model.exists() else args.model,
        "photo": None if args.photo is None else hashlib.blake2b(args.photo.read_bytes()).hexdigest(),
        "config": asdict(config),
        "device": str(device),
        "dtype": str(dtype),
        "versions": package_versions(),
        **{name: getattr(args, name) for name in _SETTINGS},
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()
