"""Which modules belong to the libraries that models are built from."""

from __future__ import annotations

import sys

#: Packages whose classes and functions are told apart by their names: their code changes with their version alone.
_LIBRARIES = frozenset({"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "fisedit_compile"})


def is_library(module: str | None) -> bool:
    """Whether the module of this name belongs to Python, torch or one of the packages that models are built from."""
    top = (module or "").partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names - {"__main__"}
