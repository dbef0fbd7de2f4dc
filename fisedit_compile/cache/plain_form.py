"""Nested values in a form that JSON holds, and back: numbers and words as they are, tensors by reference.

No class is looked up by a name from the file: what is no value of a kind listed here is refused when it is written, and
a kind that is not listed here is refused when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisedit_compile.errors import SavedBaseError

#: Puts a tensor that is named by a path away, and returns a reference to it that JSON holds.
Keep = Callable[[Tensor, str], Any]

#: The tensor of such a reference.
Fetch = Callable[[Any], Tensor]


def to_plain(value: Any, path: str, keep: Keep) -> Any:
    """A value as numbers, words, lists, and objects of one entry, whose key says what its content stands for.

    Args:
        value: None, a number, text, bytes, a list, tuple or dict, a tensor, array or picture, a dtype or device.
        path: what a user knows the value by, for messages and for the names of its tensors.
        keep: what tensors are given to.

    Raises:
        SavedBaseError: a value of another kind, named by its path.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is list:
        return [to_plain(each, f"{path}[{i}]", keep) for i, each in enumerate(value)]
    if kind in (tuple, torch.Size):
        return {"tuple": [to_plain(each, f"{path}[{i}]", keep) for i, each in enumerate(value)]}
    if kind is dict:
        return {"dict": [[to_plain(key, f"a key of {path}", keep), _entry(key, value, path, keep)] for key in value]}
    if kind is complex:
        return {"complex": [to_plain(value.real, path, keep), to_plain(value.imag, path, keep)]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, (torch.dtype, torch.device)):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if kind is Tensor:
        return {"tensor": keep(value, path)}
    if isinstance(value, (np.ndarray, np.generic)):
        return {"scalar" if isinstance(value, np.generic) else "array": keep(_tensor_of(value, path), path)}
    if isinstance(value, Image.Image):
        return {"picture": keep(_tensor_of(_pixels(value, path), path), path)}
    raise SavedBaseError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which a saved base cannot hold: use numbers, words, "
        "tensors, arrays or pictures"
    )


def from_plain(form: Any, fetch: Fetch) -> Any:
    """The value of a form that :func:`to_plain` made.

    Args:
        form: the form.
        fetch: gives the tensor of a reference.

    Raises:
        ValueError: it is not such a form.
    """
    if isinstance(form, list):
        return [from_plain(each, fetch) for each in form]
    if not isinstance(form, dict):
        return form
    if len(form) != 1:
        raise ValueError(f"an object of {len(form)} entries")
    ((kind, content),) = form.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(from_plain(each, fetch) for each in content)
    if kind == "dict":
        return {from_plain(key, fetch): from_plain(value, fetch) for key, value in content}
    if kind == "complex":
        return complex(*(from_plain(each, fetch) for each in content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dtype" and isinstance(found := getattr(torch, content, None), torch.dtype):
        return found
    if kind == "device":
        return torch.device(content)
    if kind == "tensor":
        return fetch(content)
    if kind == "array":
        return fetch(content).numpy()
    if kind == "scalar":
        return fetch(content).numpy()[()]
    if kind == "picture":
        return Image.fromarray(fetch(content).numpy())
    raise ValueError(f"an unknown kind of value, {kind!r}")


def _entry(key: Any, values: dict[Any, Any], path: str, keep: Keep) -> Any:
    return to_plain(values[key], f"{path}[{key!r}]" if path else str(key), keep)


def _tensor_of(array: Any, path: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError:
        raise SavedBaseError(
            f"{path} is an array of {np.asarray(array).dtype}, which a saved base cannot hold: use one of numbers"
        ) from None


def _pixels(picture: Image.Image, path: str) -> np.ndarray:
    pixels = np.asarray(picture)
    try:
        again = Image.fromarray(pixels).mode
    except TypeError:
        again = "none"
    if again != picture.mode:
        raise SavedBaseError(
            f"{path} is a picture of mode {picture.mode}, which a saved base cannot hold: picture.convert('RGB') first"
        )
    return pixels
