"""MACs by operator, resolution and module, those of a sparse step beside those of a dense call, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

#: Stands for a resolution where there is none, as in the layers of the time embedding and of the text.
NO_RESOLUTION = "none"


def by_area(item: tuple[str, int]) -> int:
    """The key that sorts ``(resolution, MACs)`` by resolution, the largest first and :data:`NO_RESOLUTION` last."""
    name, _ = item
    return 0 if name == NO_RESOLUTION else -prod(map(int, name.split("x")))


def lineage(path: str) -> tuple[str, ...]:
    """The lines of a report that a module is part of: its block and, if the block has such, its numbered part of that.

    ``down_blocks.0.resnets.1.conv1`` -> ``("down_blocks.0", "down_blocks.0.resnets.1")``
    """
    names = path.split(".")
    block = 2 if names[1:2] and names[1].isdigit() else 1
    lines = [".".join(names[:block])]
    if len(names) > block + 1 and names[block + 1].isdigit():
        lines.append(".".join(names[: block + 2]))
    return tuple(lines)


@dataclass(frozen=True)
class MacCount:
    """MACs of one call of a graph, broken down in three ways.

    Attributes:
        by_op: by ``"convolution"``, ``"linear"`` and ``"attention"``; the last has the two matrix products of
            attention, whose projections are linear.
        by_resolution: by the resolution ``"HxW"`` of the result, in latent pixels; ``"none"`` has time embedding and
            text.
        by_module: by the path of the innermost module, such as ``"down_blocks.0.resnets.0.conv1"``.
    """

    by_op: Mapping[str, int]
    by_resolution: Mapping[str, int]
    by_module: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_op.values())

    @property
    def without_attention(self) -> int:
        """The total without attention's matrix products, which many counters have no formula for."""
        return self.total - self.by_op["attention"]

    def __add__(self, other: MacCount) -> MacCount:
        """The sum of both, in each breakdown."""

        def add(by: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
            return {key: by.get(key, 0) + more.get(key, 0) for key in {**by, **more}}

        by_resolution = dict(sorted(add(self.by_resolution, other.by_resolution).items(), key=by_area))
        return MacCount(add(self.by_op, other.by_op), by_resolution, add(self.by_module, other.by_module))

    def of_module(self, path: str) -> int:
        """MACs of a module and of everything in it; ``""`` stands for the whole U-Net."""
        return sum(macs for module, macs in self.by_module.items() if not path or f"{module}.".startswith(f"{path}."))


@dataclass(frozen=True)
class MacReport:
    """MACs of one dense U-Net call and, if an edit was given, of one of its sparse steps.

    ``total``, ``by_op``, ``by_resolution`` and ``by_module`` are those of the sparse step if there is one, else those
    of the dense call.

    Attributes:
        dense: MACs of the dense call.
        height, width: size of the image, in pixels.
        batch: samples of the call.
        sparse: MACs of the sparse step; None without an edit, as are the following.
        edit_size: the share of latent pixels that are active.
        attention: the mode of self-attention in the sparse step, ``"full"`` or ``"masked"``.
        prompt: MACs for the text, which an edit does once and a dense call does every time.
    """

    dense: MacCount
    height: int
    width: int
    batch: int
    sparse: MacCount | None = None
    edit_size: float | None = None
    attention: str | None = None
    prompt: MacCount | None = None

    @property
    def counted(self) -> MacCount:
        return self.sparse or self.dense

    @property
    def total(self) -> int:
        return self.counted.total

    @property
    def by_op(self) -> Mapping[str, int]:
        return self.counted.by_op

    @property
    def by_resolution(self) -> Mapping[str, int]:
        return self.counted.by_resolution

    @property
    def by_module(self) -> Mapping[str, int]:
        return self.counted.by_module

    @property
    def ratio(self) -> float | None:
        """Dense MACs divided by sparse ones; None without an edit, or if the sparse step has none."""
        return self.dense.total / self.sparse.total if self.sparse and self.sparse.total else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; each entry of a breakdown is ``{"dense": int, "sparse": int | None}``."""
        return {
            "height": self.height,
            "width": self.width,
            "batch": self.batch,
            "edit_size": self.edit_size,
            "attention": self.attention,
            "macs_dense": self.dense.total,
            "macs_sparse": self.sparse.total if self.sparse else None,
            "macs_prompt": self.prompt.total if self.prompt else None,
            "ratio": self.ratio,
            **{by: self._beside(by) for by in ("by_op", "by_resolution", "by_module")},
        }

    def to_json(self, *, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        """A table for people, in G (1e9) MACs, with one line for each block instead of its modules."""
        head = f"MACs of one U-Net call, image {self.height}x{self.width}, batch {self.batch}"
        if self.sparse:
            head += f", {self.edit_size:.1%} edited, {self.attention} attention"
        rows = list(self._rows())
        width = max(len(label) for label, *_ in rows)
        columns = ("dense", "sparse", "ratio") if self.sparse else ("dense",)
        lines = [head, " " * width + "".join(f"{name:>12}" for name in columns)]
        for label, dense, sparse in rows:
            cells = [] if dense is None else [f"{dense / 1e9:,.2f} G"]
            if dense is not None and sparse is not None:
                cells += [f"{sparse / 1e9:,.2f} G", f"{dense / sparse:.2f}x" if sparse else "-"]
            lines.append((f"{label:<{width}}" + "".join(f"{cell:>12}" for cell in cells)).rstrip())
        return "\n".join(lines)

    def _beside(self, by: str) -> dict[str, dict[str, int | None]]:
        dense, sparse = getattr(self.dense, by), getattr(self.sparse, by, None)
        keys = [*dense, *(key for key in sparse or () if key not in dense)]
        return {
            key: {"dense": dense.get(key, 0), "sparse": None if sparse is None else sparse.get(key, 0)} for key in keys
        }

    def _rows(self) -> Iterator[tuple[str, int | None, int | None]]:
        """The label, dense and sparse MACs of each line of the table; a heading has None for both numbers."""

        def row(label: str, of: Callable[[MacCount], int]) -> tuple[str, int, int | None]:
            return label, of(self.dense), of(self.sparse) if self.sparse else None

        yield row("total", lambda count: count.total)
        yield row("without attention products", lambda count: count.without_attention)
        if self.prompt:
            yield f"once an edit: {self.prompt.total / 1e9:,.2f} G", None, None
        for by in ("by_op", "by_resolution"):
            yield by.replace("_", " "), None, None
            for key, macs in self._beside(by).items():
                yield f"  {key}", macs["dense"], macs["sparse"]
        yield "by module", None, None
        for path in dict.fromkeys(lineage(path)[0] for path in self._beside("by_module")):
            yield row(f"  {path}", partial(MacCount.of_module, path=path))
