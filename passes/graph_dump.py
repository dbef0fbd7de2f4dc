"""Texts of a graph before and after the passes that someone wants to look at.

``FISEDIT_DUMP_PASSES=sparsify_conv,fuse_norms`` in the environment writes them for every U-Net that the process
compiles, into the folder ``fisedit_dump`` of the current directory, as torch's ``TORCH_COMPILE_DEBUG`` does;
``FISEDIT_DUMP_PASSES=all`` does so for every pass. In a program, :func:`dump_graphs` is a context with the same effect:

    with dump_graphs("sparsify_conv", folder="dump"):
        fisedit_compile.sparsify(unet).explain(sample, timestep, encoder_hidden_states=text)

Each compiled graph gets a folder of its own, ``graph_0`` and so on, with ``04_sparsify_conv.before.txt`` and
``04_sparsify_conv.after.txt`` in it: sparsify_conv is pass 4.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule, Node

#: In the environment: the passes to dump the graph around, comma-separated, or ``all``.
VARIABLE = "FISEDIT_DUMP_PASSES"

_wanted: ContextVar[tuple[tuple[str, ...], Path] | None] = ContextVar("fisedit_dump", default=None)


@contextmanager
def dump_graphs(*names: str, folder: str | Path = "fisedit_dump") -> Iterator[None]:
    """Write the text of every graph that is compiled within the context, before and after the passes of these names.

    Args:
        names: of passes, such as ``"fuse_norms"``; ``"all"`` for every pass.
        folder: where to write; made when the first graph is written.
    """
    token = _wanted.set((names, Path(folder)))
    try:
        yield
    finally:
        _wanted.reset(token)


class GraphDump:
    """Writes one graph around the passes that were asked for, by :func:`dump_graphs` or in the environment.

    Args:
        names: the passes that will run, in their order.
        known: all names that may be asked for.

    Raises:
        ValueError: a pass was asked for that is not among ``known``.
    """

    def __init__(self, names: Sequence[str], known: Collection[str]) -> None:
        asked, folder = _wanted.get() or (_of_environment(), Path("fisedit_dump"))
        if unknown := set(asked) - {*known, "all"}:
            raise ValueError(f"no pass to dump is called {', '.join(sorted(unknown))}; give some of {', '.join(known)}")
        self._places = {name: i for i, name in enumerate(names, 1) if name in asked or "all" in asked}
        self._folder = _next_folder(folder) if self._places else folder

    def write(self, graph_module: GraphModule, name: str, moment: str) -> None:
        """Write the graph, if the pass ``name`` is wanted; ``moment`` is ``before`` or ``after``."""
        if name in self._places:
            path = self._folder / f"{self._places[name]:02}_{name}.{moment}.txt"
            path.write_text(graph_text(graph_module))


def graph_text(graph_module: GraphModule) -> str:
    """A graph for people: one line a node, with the shape of its value, its module and where its pixels lie."""
    return "\n".join(_line(node) for node in graph_module.graph.nodes) + "\n"


def _line(node: Node) -> str:
    notes = [_shape(node.meta.get("val")), str(node.meta.get("module_path", ""))]
    for key in ("layout", "row_layout"):
        if key in node.meta:
            layout = node.meta[key]
            notes.append(f"{key} {layout.roles} at {layout.size[0]}x{layout.size[1]}")
    if "stage" in node.meta:
        notes.append(f"stage {node.meta['stage']}")
    return f"{node.format_node() or node}  # " + ", ".join(note for note in notes if note)


def _shape(val: object) -> str:
    if isinstance(val, tuple | list):
        return " and ".join(_shape(each) for each in val)
    return f"{str(val.dtype).removeprefix('torch.')}{list(val.shape)}" if isinstance(val, Tensor) else ""


def _of_environment() -> tuple[str, ...]:
    return tuple(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())


def _next_folder(folder: Path) -> Path:
    """A new folder ``graph_0``, ``graph_1``, ... of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count():
        try:
            (folder / f"graph_{number}").mkdir()
        except FileExistsError:
            continue
        return folder / f"graph_{number}"
    raise AssertionError
