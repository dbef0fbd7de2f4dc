"""Exported graphs on the disk, so that another process has them without exporting the model again.

A file is named after all that its graph depends on, and holds a line with a checksum and a line of JSON. Files may be
removed at any time. They lie in ``fisedit_compile/graphs`` where the system keeps caches of a user (``XDG_CACHE_HOME``,
else ``~/.cache``), or in the folder that ``FISEDIT_COMPILE_CACHE`` names; where that is empty none are kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch.fx import GraphModule

from fisedit_compile.compiler import export, functionalize, graph_text
from fisedit_compile.compiler.graph_text import GraphTextError, as_text, of_text
from fisedit_compile.ir.call import Signature

logger = logging.getLogger(__name__)

#: Files that are kept; those that were written or read longest ago go first. One of SDXL has a megabyte.
_KEPT = 64

#: Seconds behind which a file that is being written is what a killed process left.
_ABANDONED = 3600

#: Packages whose code decides what a model's graph is.
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "fisedit_compile")


def name_of(kind: str, form: str, signature: Signature) -> str | None:
    """The name of a graph's file; None where the call has arguments of which a name cannot say all.

    Args:
        kind: the class of the exported module.
        form: of the model, see :func:`~fisedit_compile.compiler.lower.lower`.
        signature: of the call.
    """
    plain = (bool, int, float, str, type(None))
    if not all(isinstance(leaf, tuple) or type(leaf) in plain for leaf in signature.leaves):
        return None
    depends_on = (kind, form, signature.tree, signature.leaves, torch.get_default_dtype(), _versions())
    return hashlib.sha256(repr(depends_on).encode()).hexdigest() + ".json"


def read_graph(name: str) -> GraphModule | None:
    """The graph of a file, with attributes on the meta device; None where there is no such file, or a damaged one."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / name
    try:
        checksum, text = path.read_bytes().split(b"\n", 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("the graph in %s cannot be read, and is exported again (%s)", path, error)
        return None
    try:
        if hashlib.sha256(text).hexdigest().encode() != checksum:
            raise GraphTextError("its checksum is another one")
        graph_module = of_text(json.loads(text))
    except (GraphTextError, json.JSONDecodeError) as error:
        logger.warning("the graph in %s is damaged, and is exported again (%s)", path, error)
        return None
    try:
        os.utime(path)
    except OSError:  # a folder that may be read alone
        logger.debug("%s keeps its time", path)
    return graph_module


def write_graph(name: str, graph_module: GraphModule) -> None:
    """Write the graph of a file, whole or not at all; where that cannot be done the log says so."""
    folder = _folder()
    if folder is None:
        return
    try:
        text = json.dumps(as_text(graph_module)).encode()
    except GraphTextError as error:
        logger.info("the graph is not kept on the disk: %s", error)
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            try:
                file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
                file.close()
                os.replace(file.name, folder / name)
            except BaseException:
                os.unlink(file.name)
                raise
        _forget_the_oldest(folder)
    except OSError as error:
        logger.info("the graph is not kept on the disk: %s", error)


def _folder() -> Path | None:
    named = os.environ.get("FISEDIT_COMPILE_CACHE")
    if named is not None:
        return Path(named) if named else None
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return caches / "fisedit_compile" / "graphs"


def _forget_the_oldest(folder: Path) -> None:
    dated = []
    for path in folder.iterdir():
        try:
            dated.append((path.stat().st_mtime, path))
        except FileNotFoundError:  # another process was first
            continue
    graphs = sorted((at, path) for at, path in dated if path.suffix == ".json")
    abandoned = [(at, path) for at, path in dated if path.suffix == ".part" and at < time.time() - _ABANDONED]
    for _, path in (*graphs[:-_KEPT], *abandoned):
        path.unlink(missing_ok=True)


@cache
def _versions() -> tuple[str, ...]:
    """Of all code that a graph depends on; where a version may stand for several states of it, also of its files."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} is not there")
    own = b"".join(Path(str(module.__file__)).read_bytes() for module in (export, functionalize, graph_text))
    return (*versions, hashlib.sha256(own).hexdigest(), _state_of_models())


def _state_of_models() -> str:
    """Sizes and times of the files of diffusers' models, which people change in place and install from a branch."""
    found = importlib.util.find_spec("diffusers")  # not imported for it, which takes seconds
    assert found is not None
    folder = Path(str(found.origin)).parent / "models"
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()
