"""What a step reads of a base that keeps its maps in few bits a value, where the step has the sizes of its mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.kernels.indexing.packed_rows import unpack_rows_reference


def unpacked(lowered: Lowered, names: Sequence[Any], values: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The maps, and the rows of maps, that are among the inputs of a step.

    Args:
        lowered: the graphs that the step belongs to.
        names: its inputs.
        values: the base's cache as it is kept, and the plan's index tensors.
    """
    read: dict[Any, Tensor] = {}
    for name in names:
        if isinstance(name, CacheEntry) and name in lowered.kept.formats:
            form = lowered.kept.formats[name]
            read[name] = unpack_rows_reference(values[name], form)
            if (row_of := form.row_of_each_pixel(lowered.kept.cache_specs[name][0][0])) is not None:
                read[name] = read[name].index_select(0, row_of.to(read[name].device))
        elif name in lowered.fetches:
            entry, rows = lowered.fetches[name]
            read[name] = values[entry].index_select(0, values[rows])
            if entry in lowered.kept.formats:
                read[name] = unpack_rows_reference(read[name], lowered.kept.formats[entry])
    return read
