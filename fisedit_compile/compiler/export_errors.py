"""Why a U-Net could not be exported: the module and the line at which it failed, and what can be done about that."""

from __future__ import annotations

import inspect
import linecache
import traceback
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_TORCH = str(Path(torch.__file__).parent)

#: In torch's message when Python asks for a value that is known only when a graph runs.
_ASKS_FOR_VALUES = ("_local_scalar_dense", "data-dependent", "GuardOnDataDependent", "Unbacked", "unbacked")


def describe_failure(unet: torch.nn.Module, error: BaseException) -> str:
    """The error with the module, the line of code and an advice that fits its cause."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    reason = str(error).strip().splitlines() or [""]
    where = _module(unet, [frame for frame, _ in frames])
    return (
        f"{type(error).__name__}: {reason[0][:300]}"
        + (f"\nin {where}" if where else "")
        + (f", at {line}" if (line := _line(frames)) else "")
        + f"\n{_advice(unet, error, [frame for frame, _ in frames])}"
    )


def _module(unet: torch.nn.Module, frames: list[FrameType]) -> str:
    """The innermost module of the U-Net that was running."""
    paths = {id(module): path for path, module in unet.named_modules()}
    running = [frame.f_locals.get("self") for frame in frames]
    known = [each for each in running if isinstance(each, torch.nn.Module) and id(each) in paths]
    return f"{paths[id(known[-1])] or 'the U-Net'} ({type(known[-1]).__name__})" if known else ""


def _line(frames: list[tuple[FrameType, int]]) -> str:
    """The innermost line of code that is not torch's."""
    for frame, line in reversed(frames):
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, "<")) and path != __file__:
            return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()}"
    return ""


def _advice(unet: torch.nn.Module, error: BaseException, frames: list[FrameType]) -> str:
    running = {frame.f_code for frame in frames}
    for path, processor in getattr(unet, "attn_processors", {}).items():
        if not type(processor).__module__.startswith("diffusers.") and _code(type(processor).__call__) in running:
            return (
                f"It happened in the attention processor {type(processor).__name__} of "
                f"{path.removesuffix('.processor')}: unet.set_attn_processor(AttnProcessor2_0()) restores diffusers'."
            )
    for path, module in unet.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if _code(hook) in running:
                name = getattr(hook, "__qualname__", type(hook).__name__)
                return f"It happened in the hook {name} of {path or 'the U-Net'}: take it off."
    if any(sign in str(error) for sign in _ASKS_FOR_VALUES):
        return (
            "This code asks for the value of a tensor (an if, int(), .item()), which is known only when a graph runs: "
            "replace what decides by values, or use the U-Net without it."
        )
    return "If the U-Net itself fails on these arguments, too, they are at fault; else torch.export cannot follow this."


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
