"""What a count of MACs reports: totals by operator, resolution and module, dense beside sparse, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

#: The resolution of what has none: time embedding and text.
NO_RESOLUTION = "none"


def by_area(item: tuple[str, int]) -> int:
    """Sorts ``(resolution, MACs)``: the largest resolution first, what has none last."""
    name, _ = item
    return 0 if name == NO_RESOLUTION else -prod(map(int, name.split("x")))


def lineage(path: str) -> tuple[str, ...]:
    """The lines that a module belongs to: its block and, where there are several alike, its numbered part of that.

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
    """MACs of one call of a graph.

    Attributes:
        by_op: of ``"convolution"``, ``"linear"`` and ``"attention"`` (the matrix products of attention, whose
            projections are linear).
        by_resolution: of ``"HxW"`` in latent pixels, and ``"none"`` for time embedding and text.
        by_module: of the path of each innermost module, such as ``"down_blocks.0.resnets.0.conv1"``.
    """

    by_op: Mapping[str, int]
    by_resolution: Mapping[str, int]
    by_module: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_op.values())

    @property
    def without_attention(self) -> int:
        """The total without attention's matrix products, as counters without a formula for them have it."""
        return self.total - self.by_op["attention"]

    def __add__(self, other: MacCount) -> MacCount:
        """Both together."""

        def add(by: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
            return {key: by.get(key, 0) + more.get(key, 0) for key in {**by, **more}}

        by_resolution = dict(sorted(add(self.by_resolution, other.by_resolution).items(), key=by_area))
        return MacCount(add(self.by_op, other.by_op), by_resolution, add(self.by_module, other.by_module))

    def of_module(self, path: str) -> int:
        """MACs of a module and everything in it; ``""`` is the whole."""
        return sum(macs for module, macs in self.by_module.items() if not path or f"{module}.".startswith(f"{path}."))


@dataclass(frozen=True)
class MacReport:
    """MACs of one U-Net call: dense, and those of a sparse step where an edit was given.

    Sizes are those of the image in pixels. ``edit_size`` is the share of active latent pixels. ``prompt`` is what a
    dense call does for the text in each step, and an edit once. ``total``, ``by_op``, ``by_resolution`` and
    ``by_module`` are those of the sparse step where there is one, else of the dense call.
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
        """Dense over sparse MACs, None without an edit or where nothing is left to compute."""
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
        """As text for people, in G (1e9) MACs; modules are summed to blocks."""
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
        """Label, dense and sparse MACs of each line of the table; a heading has no numbers."""

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
