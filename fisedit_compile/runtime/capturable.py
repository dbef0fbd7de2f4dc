"""Models whose forward is not their own: which of them a graph can stand for, and what to do about the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fisedit_compile.errors import CaptureError

#: Names in diffusers' registries of hooks.
_GROUP_OFFLOAD = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")
_CASTING = ("layerwise_casting", "peft_autocast_disable")


def refuse_uncapturable(unet: torch.nn.Module) -> None:
    """Hold a U-Net to what an exported graph can stand for.

    Raises:
        CaptureError: weights are offloaded or cast layer by layer, tokens are merged, or the model is being trained.
    """
    if unet.training:
        raise CaptureError("the U-Net is in training mode: call unet.eval() first")
    for path, module in unet.named_modules():
        attributes = vars(module)
        for name in getattr(attributes.get("_diffusers_hook"), "hooks", ()):
            if name in _GROUP_OFFLOAD:
                raise CaptureError(
                    "group offloading brings the U-Net's weights to the device layer by layer, an exported graph needs "
                    "them there: load the pipeline without it; pipe.enable_model_cpu_offload() works"
                )
            if name in _CASTING:
                raise CaptureError(
                    "layerwise casting keeps the U-Net's weights in another dtype than they run in, an exported graph "
                    "reads them as they lie: load the U-Net without enable_layerwise_casting(), in torch.float16 or "
                    "torch.bfloat16"
                )
            raise CaptureError(
                f"the hook {name!r} of {path or 'the U-Net'} decides at each call what is computed, an exported graph "
                "computes the same each time: take it off first (unet.disable_cache(), for a cache of diffusers)"
            )
        hook = attributes.get("_hf_hook")
        if hook is not None and not _is_model_offload(hook):
            raise CaptureError(
                f"accelerate's {type(hook).__name__} of {path or 'the U-Net'} brings weights to the device layer by "
                "layer (sequential CPU offload, a device_map), an exported graph needs them there: load the pipeline "
                "without it; pipe.enable_model_cpu_offload() works"
            )
        if type(module).__name__ == "ToMeBlock":
            raise CaptureError(
                "token merging (tomesd) draws at random which tokens it merges, an exported graph would merge the same "
                "ones at each step: call tomesd.remove_patch(pipe) first"
            )


def refuse_autocast() -> None:
    """Refuse to run where operations choose a dtype of their own: recorded and fresh values would have several.

    Raises:
        CaptureError: ``torch.autocast`` is on.
    """
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            raise CaptureError(
                f"torch.autocast({device!r}) is on, and what is recorded and computed sparsely has the dtype of the "
                "U-Net's weights: leave the context, and load the pipeline with dtype=torch.float16 or torch.bfloat16"
            )


def settle_adapters(unet: torch.nn.Module) -> None:
    """Take fused adapters that were disabled out of the weights, as their layers do when they are called next.

    Within an export that would be noted on the layer, but not done to the weights.
    """
    for module in unet.modules():
        if getattr(module, "disable_adapters", False) is True and getattr(module, "merged", False) is True:
            module.unmerge()  # type: ignore[operator]


def bring_weights(unet: torch.nn.Module) -> bool:
    """Under model offload (``enable_model_cpu_offload``) bring the U-Net to its device, as a call of it would.

    Returns:
        Whether it had to be brought.
    """
    hook = vars(unet).get("_hf_hook")
    if hook is None or not _is_model_offload(hook):
        return False
    before = next(unet.parameters()).device
    hook.pre_forward(unet)
    return next(unet.parameters()).device != before


@contextmanager
def without_offload(unet: torch.nn.Module) -> Iterator[None]:
    """Within the context the U-Net's forward is its own, without the hook of model offload."""
    hooked = vars(unet).pop("forward", None) if "_hf_hook" in vars(unet) else None
    try:
        yield
    finally:
        if hooked is not None:
            vars(unet)["forward"] = hooked


def _is_model_offload(hook: Any) -> bool:
    """The hook that moves a model as a whole, before its first call."""
    return type(hook).__name__ == "CpuOffload"
