"""A base as what lies on disk: which of its values go where."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fisedit_compile.cache.base_manifest import DECODER, FIRST, call_shard
from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.plain_form import Keep, to_plain
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.editing.recorded_call import WrittenCall
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.vae.decoded import Decoded

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base

#: Fields of a base that are written as they are.
PLAIN = ("nsfw", "prompts", "step_latents", "generators", "visits", "callback", "seconds", "unet_ms", "pictures")


def pack(base: Base) -> PackedBase:
    """A base as it is written to disk.

    Raises:
        SavedBaseError: an argument of the pipeline that cannot be kept, by name.
    """
    packed = PackedBase()
    first = packed.keep_in(FIRST)
    values = {
        "arguments": dict(base.arguments),
        **{name: getattr(base, name) for name in PLAIN},
        "solver_steps": tuple(tuple(step) for step in base.solver_steps),
        "config": asdict(base.config),
        "frame": base.frame and (list(base.frame.photos), base.frame.box, base.frame.size),
        "schedule": (base.schedule.name, dict(base.schedule.config), dict(base.schedule.tables)),
        "pipeline": (base.pipeline.kind, dict(base.pipeline.tokens)),
        "models": {name: _state_values(state) for name, state in base.pipeline.models.items()},
    }
    content = {name: to_plain(value, name, first) for name, value in values.items()}
    content["calls"] = []
    for i, call in enumerate(base.calls):
        about = (call.step, *_about(call.cache))
        if isinstance(call, WrittenCall):
            entries = call.entries
        else:
            entries = entries_of(call.cache, packed.keep_in(call_shard(i)))
        content["calls"].append([to_plain(about, f"calls[{i}]", first), entries])
    content["decoded"] = _decoder_values(base.decoded, packed)
    packed.content, packed.summary = content, _summary(base)
    return packed


def _summary(base: Base) -> dict[str, Any]:
    return {
        "pipeline": base.pipeline.kind,
        "prompts": list(base.prompts),
        "steps": base.num_inference_steps,
        "visited_steps": len(base.visits),
        "scheduler": base.schedule.name,
        "latents": list(base.latents.shape),
        "pil": base.arguments.get("output_type", "pil") == "pil",
        "dtype": str(base.latents.dtype).removeprefix("torch."),
        "device": str(base.latents.device),
        "config": asdict(base.config),
        "unet": base.pipeline.models["unet"].digest(),
        "bytes": base.nbytes,
    }


def _decoder_values(decoded: Decoded | None, packed: PackedBase) -> Any:
    if decoded is None:
        return None
    keep = packed.keep_in(DECODER)
    latents, about = to_plain(decoded.latents, "latents", keep), to_plain(_about(decoded.cache), "decoded", keep)
    return [latents, about, entries_of(decoded.cache, keep)]


def _about(cache: Recorded) -> tuple[Any, ...]:
    return cache.signature.tree, cache.signature.leaves, cache.timesteps


def entries_of(cache: Recorded, keep: Keep) -> list[Any]:
    """What a call keeps, in a form that JSON holds; its tensors are given to ``keep``."""
    return [[entry.kind, entry.node, keep(tensor, entry.name)] for entry, tensor in cache.items()]


def _state_values(state: ModelState) -> tuple[Any, ...]:
    return dict(state.values), state.behaviour, state.names, state.checksums()
