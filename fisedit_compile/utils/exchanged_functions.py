"""Functions that somebody has put in the place of a library's own, which models call by name.

Methods that are exchanged in a class are part of what :mod:`~fisedit_compile.runtime.description` says of a model;
what a library's functions call is not, so that it is looked for before graphs of an earlier export are taken.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType

from fisedit_compile.utils.libraries import is_library

#: Where the functions that models call are looked up, and what begins the names of further such modules.
_MODULES = ("torch.nn.functional", "diffusers.utils.torch_utils")
_PACKAGES = ("diffusers.models.", "peft.tuners.lora")

#: Is part of a model's description.
_ATTENTION = "torch.nn.functional.scaled_dot_product_attention"

#: Packages whose functions these modules import themselves.
_IMPORTED = frozenset({"huggingface_hub", "safetensors", "typing_extensions"}) | {
    *("flash_attn", "flash_attn_interface", "sageattention", "xformers"),
}


def exchanged_functions() -> list[str]:
    """Where functions lie that are not of the library; none as a rule. Takes some 5 ms."""
    found = []
    for module in _modules():
        for name, value in list(vars(module).items()):
            while isinstance(value, functools.partial):
                value = value.func
            if isinstance(value, FunctionType) and _is_a_user_s(value):
                found.append(f"{module.__name__}.{name}")
    return [name for name in found if name != _ATTENTION]


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name in _MODULES or name.startswith(_PACKAGES)):
            yield module


def _is_a_user_s(function: FunctionType) -> bool:
    # Not by ``__module__``, which functools.wraps copies from the function that was there before.
    module = str(function.__globals__.get("__name__", ""))
    return not is_library(module) and module.partition(".")[0] not in _IMPORTED
