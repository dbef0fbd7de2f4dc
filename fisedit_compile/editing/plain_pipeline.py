"""A pipeline from a folder, and a picture generated with it the dense way."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.runtime.timer import UNetTimer


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The diffusers pipeline in ``folder``, in eval mode; nothing is downloaded.

    Raises:
        ValueError: no such folder, or none of a pipeline.
        OSError: a file of the pipeline is missing.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no folder of a diffusers pipeline (no model_index.json in it): "
            "give one that pipe.save_pretrained(...) wrote"
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
            str(folder), torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=is_accelerate_available()
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
