"""A pipeline from a folder or the Hugging Face Hub, and a picture generated with it the dense way."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.runtime.timer import UNetTimer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(model: str | Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The diffusers pipeline in a folder or of the Hugging Face Hub, in eval mode.

    Args:
        model: a folder that ``pipe.save_pretrained`` wrote, of which nothing is downloaded; or, where nothing of this
            name is there, ``owner/name`` on the Hub, as diffusers downloads and keeps it.
        device, dtype: where and as what the models are.

    Raises:
        ValueError: neither.
        OSError: a file of the pipeline is missing, or cannot be downloaded.
    """
    folder = Path(model)
    from_hub = not folder.exists() and _HUB_ID.fullmatch(str(model)) is not None
    if not from_hub and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{model} is no folder of a diffusers pipeline (no model_index.json in it): "
            "give one that pipe.save_pretrained(...) wrote, or owner/name of the Hugging Face Hub"
        )
    import transformers  # before diffusers' pipelines, which make it warn of packages for other models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from diffusers import DiffusionPipeline
    from diffusers.utils import is_accelerate_available

    with warnings.catch_warnings():
        # Its new name, dtype, is unknown to the oldest diffusers that we take.
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(
            str(model),
            torch_dtype=dtype,
            local_files_only=not from_hub,
            low_cpu_mem_usage=is_accelerate_available(),
        )
    return pipe.to(device)


@dataclass(frozen=True)
class DenseRegeneration:
    """A picture made with the plain pipeline: wall seconds, and wall milliseconds of each U-Net call."""

    image: Any
    seconds: float
    unet_ms: list[float]


def regenerate(pipe: Any, prompt: str, **arguments: Any) -> DenseRegeneration:
    """Call ``pipe`` as it is, and time it."""
    with _timed(pipe.unet, pipe.device) as timer:
        start = time.perf_counter()
        image = pipe(prompt, **arguments).images[0]  # a PIL image: the device has finished
        seconds = time.perf_counter() - start
    return DenseRegeneration(image, seconds, timer.milliseconds()["dense"])


@contextmanager
def _timed(unet: torch.nn.Module, device: torch.device) -> Iterator[UNetTimer]:
    """Within the context each call of ``unet`` is timed."""
    timer, forward = UNetTimer(), unet.forward
    unet.forward = lambda *args, **kwargs: timer.time("dense", device, lambda: forward(*args, **kwargs))
    try:
        yield timer
    finally:
        del unet.forward  # the class's own again
