"""Times of whole edits, from words to pixels, beside the same pipeline under ``torch.compile``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch

from fisedit_compile.bench.edit.decodes import Decodes
from fisedit_compile.bench.edit.random_pipeline import random_pipeline
from fisedit_compile.bench.edit.timer import Timer
from fisedit_compile.bench.masks import MaskSet
from fisedit_compile.bench.progress import say
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.editor import Editor
from fisedit_compile.editing.result import Edit

#: The picture's words, and those of its edits: one word differs, as in the paper's edits.
PROMPT, EDIT = "a photo of a cat on a chair", "a photo of a dog on a chair"

#: No two edits have the same words, since the editor does not encode a text twice.
_EDITS = [f"a photo of a dog{number} on a chair" for number in range(1000)]

#: Calls of a compiled pipeline until its CUDA graphs are captured and replayed.
_UNTIL_REPLAY = 3


@dataclass(frozen=True)
class Settings:
    """Options of the benchmark.

    Attributes:
        arch: a name in :data:`fisedit_compile.architectures.ARCHITECTURES`.
        size: of the square image, in pixels.
        steps: denoising steps of the base.
        scheduler: a name in :data:`fisedit_compile.bench.edit.random_pipeline.SCHEDULERS`.
        guidance: classifier-free guidance scale; 1 or less turns it off, and halves the U-Net's batch.
        baseline: the mode of ``torch.compile`` of the opponent's U-Net, or ``"none"`` to leave it out.
        repeats: timed pictures of each kind, after one that is not timed.
    """

    arch: str
    size: int
    steps: int
    scheduler: str
    guidance: float
    baseline: str
    repeats: int


def bench_edit(
    settings: Settings,
    masks: Sequence[MaskSet],
    config: SparsityConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Time pictures of the plain and of the compiled pipeline, recorded bases, and edits of each set of masks.

    Args:
        keep: called with the result so far whenever a part of it is ready.
    """
    result: dict[str, Any] = {"config": asdict(config)}
    with torch.inference_mode():
        pipe = _pipeline(settings, device, dtype)
        timer = Timer(device, settings.repeats)
        result["parts_ms"] = _parts(pipe, settings, timer)
        result["plain_ms"] = timer.milliseconds("the plain pipeline", lambda: _picture(pipe, settings, settings.steps))
        keep(result)
        editor = Editor(pipe, config)
        start = time.perf_counter()
        base = _base(editor, settings)
        result["first_base_s"] = time.perf_counter() - start
        result["base_gib"] = base.nbytes / 2**30
        result["recording_ms"] = timer.milliseconds("recorded bases", lambda: _base(editor, settings))
        keep(result)
        result["rows"], new_words = [], cycle(_EDITS)
        decodes = Decodes(pipe, base, timer)
        for each in masks:
            row = _row(editor, base, each, timer, new_words)
            result["rows"].append({**row, **decodes.milliseconds(each)})
            keep(result)
        if device.type == "cuda":
            result["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if settings.baseline != "none":
            result["compiled_ms"] = _compiled(pipe, settings, timer, result["rows"])
            keep(result)
    return result


def _pipeline(settings: Settings, device: torch.device, dtype: torch.dtype) -> Any:
    say(f"building {settings.arch} with random weights ...")
    return random_pipeline(
        settings.arch,
        size=settings.size,
        words=(PROMPT, EDIT, *_EDITS),
        scheduler=settings.scheduler,
        device=device,
        dtype=dtype,
    )


def _arguments(settings: Settings, steps: int) -> dict[str, Any]:
    return {
        "height": settings.size,
        "width": settings.size,
        "num_inference_steps": steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator("cpu").manual_seed(0),
    }


def _picture(pipe: Any, settings: Settings, steps: int) -> Any:
    return pipe(EDIT, **_arguments(settings, steps)).images[0]


def _base(editor: Editor, settings: Settings) -> Base:
    return editor.generate(PROMPT, **_arguments(settings, settings.steps))


def _parts(pipe: Any, settings: Settings, timer: Timer) -> dict[str, float]:
    """Milliseconds of what a picture takes besides its U-Net calls and its loop, each by itself."""
    guided = settings.guidance > 1
    side = settings.size // pipe.vae_scale_factor
    device, dtype = pipe.unet.device, pipe.unet.dtype
    latents = torch.randn(1, pipe.unet.config.in_channels, side, side, device=device, dtype=dtype)
    image = pipe.vae.decode(latents, return_dict=False)[0]
    encode = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
    return {
        "text": timer.milliseconds("text encoder", lambda: pipe.encode_prompt(EDIT, **encode)),
        "vae": timer.milliseconds("decoder", lambda: pipe.vae.decode(latents, return_dict=False)[0]),
        "to_pil": timer.milliseconds("to PIL", lambda: pipe.image_processor.postprocess(image, output_type="pil")),
    }


def _row(editor: Editor, base: Base, masks: MaskSet, timer: Timer, new_words: Iterator[str]) -> dict[str, Any]:
    """Edits of one set of masks: each is edited once untimed, since its sizes may have to be captured."""
    say(f"edits at {masks.active:.1%} ({masks.source}) ...")
    edits: list[Edit] = []
    seconds: list[float] = []

    def edit(mask: torch.Tensor) -> None:
        edits.append(editor.edit(base, next(new_words), mask=mask))

    for mask in masks.masks:
        start = time.perf_counter()
        editor.edit(base, next(new_words), mask=mask)
        seconds.append(time.perf_counter() - start)
    repeats = max(timer.repeats if len(masks.masks) == 1 else 1, 1)
    times = [timer.once(partial(edit, mask)) for _ in range(repeats) for mask in masks.masks]
    reports = [edit.report for edit in edits]
    return {
        "edit_size": masks.edit_size,
        "active": masks.active,
        "source": masks.source,
        "masks": len(masks.masks),
        "edit_ms": median(times),
        "first_edit_s": seconds[0],
        "dense_steps": reports[0].dense_steps,
        "sparse_steps": reports[0].sparse_steps,
        "dense_step_ms": _median(report.unet_ms["dense_step"] for report in reports),
        "sparse_step_ms": _median(report.unet_ms["sparse_step"] for report in reports),
        "plan_ms": _median(report.plan_ms for report in reports),
    }


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _compiled(pipe: Any, settings: Settings, timer: Timer, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a picture of the pipeline with U-Net and decoder compiled, by its number of steps.

    Numbers of steps are the base's, and those that edits make.
    """
    say(f"compiling the U-Net ({settings.baseline}) and the decoder ...")
    mode = None if settings.baseline == "compile" else settings.baseline
    pipe.unet = torch.compile(pipe.unet, mode=mode)
    pipe.vae.decode = torch.compile(pipe.vae.decode)
    for _ in range(_UNTIL_REPLAY):
        _picture(pipe, settings, 3)
    steps = [settings.steps, *(row["dense_steps"] + row["sparse_steps"] for row in rows)]
    return {
        str(count): timer.milliseconds(
            f"the compiled pipeline, {count} steps", partial(_picture, pipe, settings, count)
        )
        for count in dict.fromkeys(steps)
    }
