"""A user's ``callback_on_step_end``, called as the pipeline itself would, and what it changed; or one of each edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.pipeline_call import PipelineCall


class StepCallback:
    """Runs a callback of a user at the end of each step.

    Args:
        callback: a function of pipeline, step, timestep and a dict of tensors, an official ``PipelineCallback``, or
            ``MultiPipelineCallbacks``.
        tensor_inputs: names of the tensors that it is given; an official callback says itself. None is ``["latents"]``.
        pipe: the pipeline, which knows the names there are.

    Attributes:
        name: what users know it by.
        tensor_inputs: the names.
        official: whether it is one of diffusers' own kind, made to change the loop.
        changed: what it changed so far: names of tensors, and of attributes of the pipeline.

    Raises:
        ValueError: not callable; an unknown name; or a callback that changes the U-Net itself within the loop.
    """

    def __init__(self, callback: Callable[..., Any], tensor_inputs: Sequence[str] | None, pipe: Any) -> None:
        from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback

        self.name = _name(callback)
        if "callback_on_step_end" not in call_parameters(pipe):
            raise ValueError(f"{type(pipe).__name__} takes no callback_on_step_end: leave {self.name} out")
        if not callable(callback):
            raise ValueError(
                f"callback_on_step_end is a {type(callback).__name__}: give a function or a callback object"
            )
        parts = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
        if any(isinstance(part, IPAdapterScaleCutoffCallback) for part in parts):
            raise ValueError(
                f"{self.name} changes the scale of the IP-Adapter within the loop, but all steps of a base are of one "
                "model: leave the callback out, and set pipe.set_ip_adapter_scale(...) for the whole generation"
            )
        self.official = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
        if self.official:
            tensor_inputs = callback.tensor_inputs  # type: ignore[attr-defined]
        self.tensor_inputs = _names(["latents"] if tensor_inputs is None else tensor_inputs, pipe)
        self.changed: set[str] = set()
        self._callback = callback

    def __call__(self, call: PipelineCall, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The tensors that the callback returned; None is no change.

        Raises:
            ValueError: it changed the pipeline that the editor was made with, instead of the one that it is given.
        """
        given = {name: values[name] for name in self.tensor_inputs}
        before = {name: each.clone() for name, each in given.items() if isinstance(each, Tensor)}
        loop, original = dict(vars(call.pipe)), call.original_state()
        returned = self._callback(call.pipe, index, timestep, given) or {}
        if written := _differing(original, call.original_state()):
            raise ValueError(
                f"{self.name} changed {', '.join(sorted(written))} of the pipeline itself: change the pipeline that "
                "is its first argument (or another thread called the pipeline meanwhile)"
            )
        now = {**given, **returned}
        self.changed |= {name for name, each in before.items() if not _same(each, now[name])}
        self.changed |= _differing(loop, vars(call.pipe)) - {"_interrupt"}
        return returned


class BatchCallback:
    """Callbacks of several edits as one of all their samples.

    Args:
        parts: the callback of each edit, None without one, and its first sample and the one behind its last.

    Attributes:
        callbacks: those that there are.
    """

    def __init__(self, parts: Sequence[tuple[Callable[..., Any] | None, tuple[int, int]]]) -> None:
        self.callbacks = [callback for callback, _ in parts if callback is not None]
        self._parts = parts

    def __call__(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The latents of all samples, with those that callbacks returned in the place of others.

        Raises:
            ValueError: one returned other tensors, or latents of another shape.
        """
        latents = values["latents"]
        for callback, (first, end) in self._parts:
            if callback is None:
                continue
            own = latents[first:end].clone()
            returned = callback(pipe, index, timestep, {"latents": own}) or {}
            now = returned.get("latents", own)
            if set(returned) - {"latents"} or now.shape != own.shape:
                raise ValueError(f"{_name(callback)} of an edit among several may return its latents alone")
            latents[first:end] = now
        return {"latents": latents}


def _name(callback: Any) -> str:
    if parts := getattr(callback, "callbacks", None):
        return " and ".join(_name(part) for part in parts)
    return getattr(callback, "__qualname__", None) or type(callback).__name__


def _names(tensor_inputs: Any, pipe: Any) -> list[str]:
    """Names of tensors, without repetitions, that the pipeline's loop has.

    Raises:
        ValueError: no names, or others.
    """
    if not isinstance(tensor_inputs, (list, tuple)) or not all(isinstance(name, str) for name in tensor_inputs):
        raise ValueError(f"callback_on_step_end_tensor_inputs={tensor_inputs!r}: give a list of names")
    known = getattr(pipe, "_callback_tensor_inputs", ["latents"])
    if unknown := [name for name in tensor_inputs if name not in known]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: {type(pipe).__name__} has no {', '.join(unknown)} to give; "
            f"it has {', '.join(known)}"
        )
    return list(dict.fromkeys(tensor_inputs))


def _differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names whose values are new, gone, or others than before; of what is no plain value, other objects."""
    common = before.keys() & after.keys()
    return (before.keys() ^ after.keys()) | {name for name in common if not _is_same(before[name], after[name])}


def _is_same(before: Any, after: Any) -> bool:
    plain = isinstance(before, (int, float, str)) and type(before) is type(after)
    return before is after or (plain and before == after)


def _same(before: Tensor, after: Any) -> bool:
    same = isinstance(after, Tensor) and after.shape == before.shape and after.dtype == before.dtype
    return same and torch.allclose(after, before.to(after.device), rtol=0, atol=0, equal_nan=True)
