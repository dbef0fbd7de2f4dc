"""Values that say all by themselves: numbers, words, dtypes; and objects of which only the kind counts."""

from __future__ import annotations

import enum
import math
from types import ModuleType
from typing import Any

import torch

from fisedit_compile.utils.libraries import is_library

SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})
NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, enum.Enum, range, slice)

#: Objects that a processor may hold without depending on what happens inside them.
_OPAQUE_MODULES = ("diffusers.pipelines", "diffusers.schedulers", "diffusers.image_processor", "torch._dynamo")

_LOOKED_INTO = ("diffusers", "peft", "accelerate", "fisedit_compile")


def canonical(value: Any) -> Any:
    """A plain value that equals what behaves alike, and that can be pickled.

    Floats have 12 digits: scaling a LoRA for one call and back may change the last ones.
    """
    if isinstance(value, float):
        return float(f"{value:.12g}") if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(canonical, value))
    return value if type(value) in SCALARS else str(value)


def is_opaque(value: Any) -> bool:
    module = type(value).__module__
    if isinstance(value, ModuleType) or module.startswith(_OPAQUE_MODULES):
        return True
    return is_library(module) and module.partition(".")[0] not in _LOOKED_INTO
