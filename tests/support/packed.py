"""A small base as it is written to disk, without a model behind it; and saved bases whose files are forged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.cache.base_manifest import BaseFile, Manifest
from fisedit_compile.cache.file_checksum import checksum
from fisedit_compile.cache.packed_base import PackedBase


def packed_base(seed: int = 0, *, shards: int = 3, kib: int = 64) -> PackedBase:
    """A base of ``shards`` U-Net calls of ``kib`` KiB each."""
    packed = PackedBase({"prompts": [f"base {seed}"]})
    noise = torch.Generator().manual_seed(seed)
    names = ["base.safetensors", *(f"call-{i:04}.safetensors" for i in range(shards))]
    packed.content = [packed.keep_in(name)(torch.randn(kib, 256, generator=noise), "noise") for name in names]
    return packed


def forge(folder: Path, file: str, data: bytes, **claims: Any) -> None:
    """Replace a file of a saved base, and let the manifest say that it was written so, or what ``claims`` say."""
    (folder / file).write_bytes(data)
    path = folder / "manifest.json"
    manifest = Manifest.of_json(path.read_bytes(), folder)
    forged = BaseFile(**{"name": file, "bytes": len(data), "checksum": checksum(data), **claims})
    files = [forged if each.name == file else each for each in manifest.files]
    path.write_bytes(replace(manifest, files=tuple(files)).to_json())


def forge_content(folder: Path, change: Any) -> None:
    """Replace ``base.json`` by what ``change`` makes of its content."""
    content = json.loads((folder / "base.json").read_bytes())
    change(content)
    forge(folder, "base.json", json.dumps(content).encode())
