"""The manifest of a saved base: what its files are, and which versions wrote them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fisedit_compile.errors import BaseFormatError, BaseMismatchError, BaseVersionError, DamagedBaseError

MANIFEST = "manifest.json"
CONTENT = "base.json"

#: The shard that is read first (latents, pictures, arguments, all but what follows), and what is kept of the decoder.
FIRST, DECODER = "base.safetensors", "decoder.safetensors"

#: Names of the files of a base; :func:`call_shard` gives those of the shards that hold what a U-Net call keeps each.
OWN_FILES = re.compile(r"manifest\.json|base\.json|(base|decoder|call-\d{4,})\.safetensors")

#: Bytes at the beginning of a shard that say how long its header is, little-endian.
LENGTH = 8

#: How hidden folders end in which a base is being written or removed; before it a dot, the base's name, eight digits.
PARTIAL, REMOVED = ".partial", ".removed"

FORMAT, FORMAT_VERSION = "fisedit_compile base", 5

#: More bytes than any manifest or content takes: a U-Net of SDXL has some thousand tensors and ten thousand values.
MOST_JSON = 64 * 2**20

WHAT_TO_DO = "remove the folder and generate the base again"

#: Packages whose versions decide how nodes of a graph are named and what models hold.
_PACKAGES = ("fisedit-compile", "torch", "diffusers")


@dataclass(frozen=True)
class BaseFile:
    """A file of a base: its name, size in bytes, and :class:`~fisedit_compile.cache.file_checksum.FileChecksum`."""

    name: str
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        summary: see :class:`~fisedit_compile.cache.packed_base.PackedBase`.
        files: all other files of the base.
        versions: the versions of the packages that wrote the base, by name.
        saved: the time at which it was written, in UTC.
    """

    summary: Mapping[str, Any]
    files: tuple[BaseFile, ...]
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    saved: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def checksum(self) -> str:
        """The checksum of all that the manifest says, and so of all files."""
        return hashlib.sha256(json.dumps(self._values(), sort_keys=True).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> bytes:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "checksum": self.checksum}
        return (json.dumps({**head, **self._values()}, indent=1) + "\n").encode()

    @classmethod
    def of_json(cls, data: bytes | bytearray, folder: Path) -> Manifest:
        """The manifest of a file's content; ``folder`` is for messages.

        Raises:
            BaseFormatError: the file is of something else.
            BaseVersionError: it is of a format that this version does not read.
            DamagedBaseError: it is not what was written.
        """
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            raise DamagedBaseError(f"{folder}: {MANIFEST} is damaged: {WHAT_TO_DO}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise BaseFormatError(f"{folder} is no saved base: its {MANIFEST} is of something else")
        if values.get("format_version") != FORMAT_VERSION:
            raise BaseVersionError(
                f"{folder} is of format {values.get('format_version')!r}, this version reads format {FORMAT_VERSION}: "
                f"use the version that wrote it ({_in_words(values.get('versions'))}), or generate the base again"
            )
        try:
            files = tuple(BaseFile(**file) for file in values["files"])
            manifest = cls(values["summary"], files, values["versions"], values["saved"])
            intact = manifest.checksum == values["checksum"] and all(OWN_FILES.fullmatch(file.name) for file in files)
        except (KeyError, TypeError):
            intact = False
        if not intact:
            raise DamagedBaseError(f"{folder}: {MANIFEST} is damaged: {WHAT_TO_DO}")
        return manifest

    def check_versions(self, folder: Path) -> None:
        """Hold the versions that wrote the base to those that run; builds of one version are alike.

        Raises:
            BaseMismatchError: another version.
        """
        for name in _PACKAGES:
            then, now = (str(each).partition("+")[0] for each in (self.versions.get(name), _version(name)))
            if then != now:
                raise BaseMismatchError(
                    f"{folder} was saved with {name} {then}, and this is {name} {now}: a base holds values of graphs "
                    "that other versions may build otherwise, so generate it again"
                )

    def _values(self) -> dict[str, Any]:
        return asdict(self)


def call_shard(index: int) -> str:
    """The name of the shard of a U-Net call, counted from 0."""
    return f"call-{index:04}.safetensors"


def package_versions() -> dict[str, str]:
    """The versions of the packages that decide how nodes of a graph are named and what models hold, by name."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    return metadata.version(package)


def _in_words(versions: Any) -> str:
    return (
        ", ".join(f"{name} {version}" for name, version in versions.items())
        if isinstance(versions, dict)
        else "unknown"
    )
