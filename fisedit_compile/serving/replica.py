"""One replica: a pipeline, its editor, and the engine and worker over them, from the options of a service."""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fisedit_compile.cache.memory import free_bytes
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import FiseditError
from fisedit_compile.serving.engine import Engine
from fisedit_compile.serving.held_bases import HeldBases, open_library, open_store
from fisedit_compile.serving.requests import Settings
from fisedit_compile.serving.worker import Worker

if TYPE_CHECKING:
    from fisedit_compile.editing.editor import Editor

logger = logging.getLogger(__name__)

#: Share of the free memory that bases may take, where no other limit is given: on a GPU, which a replica has alone, and
#: on the host.
_SHARES = {"cuda": 0.5, "cpu": 0.25}

#: Words of the pictures that are drawn before the first request, and the steps of these: a dense and a sparse one.
_WORDS, _STEPS = ("a cat", "a dog"), 2

#: Shares of a picture's sides that masks of these edits cover. Small and large masks have graphs of their own, and on a
#: GPU there is one for each of a few sizes.
_SIDES_OF_MASKS = {"cpu": (0.1, 0.5), "cuda": (0.1, 0.2, 0.25, 0.3, 0.37, 0.45, 0.55, 0.65)}

#: The mode of ``torch.compile`` that draws fastest (docs/performance.md): with CUDA graphs.
_COMPILE_MODE = "reduce-overhead"

#: Pictures that a compiled pipeline draws until its CUDA graphs are captured and replayed.
_UNTIL_REPLAY = 3


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is made of; plain data, as it goes to other processes.

    Attributes:
        model: folder of a diffusers pipeline.
        folder: of the service, with pictures and bases.
        store_bytes: that all bases may take on the disk.
        memory_bytes: that the bases of one replica may take in memory; None is a share of what is free.
        device, dtype: of the pipeline, by torch's names.
        threads: of torch.
        replicas: how many there may be, which share the host's memory.
        batch: edits that are made together at most, a power of two.
        keep_bases: whether new pictures are drawn with bases, which go to the disk: not where no picture is reused.
        compile: whether the pipeline's own U-Net runs under ``torch.compile``, which pictures without a base use.
        config: fields of the editor's config.
    """

    model: str
    folder: str
    store_bytes: int
    memory_bytes: int | None
    device: str
    dtype: str
    threads: int
    replicas: int
    batch: int = 1
    keep_bases: bool = True
    compile: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineFacts:
    """What a front has to know of the pipeline that draws.

    Attributes:
        digest: of :meth:`fisedit_compile.Editor.digest`.
        side: of its pictures, in pixels, where no size is asked for.
        multiple: that the sides of its pictures are multiples of.
    """

    digest: str
    side: int
    multiple: int


def build_worker(options: ReplicaOptions) -> Worker:
    """The worker of a replica, ready to draw: all that is compiled on first use is compiled."""
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.plain_pipeline import load_pipeline

    torch.set_num_threads(options.threads)
    pipe = load_pipeline(Path(options.model), torch.device(options.device), getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    if options.compile:
        pipe.unet.compile(mode=_COMPILE_MODE)
    editor = Editor(pipe, SparsityConfig.of(options.config))
    folder = Path(options.folder)
    library, store = open_library(folder), open_store(folder, options.store_bytes)
    if options.keep_bases:
        _warm_up(editor, facts_of(editor).side, options.batch)
    memory = options.memory_bytes
    if memory is None:
        kind = pipe.device.type
        memory = int(_SHARES[kind] * free_bytes(pipe.device) / (options.replicas if kind == "cpu" else 1))
    bases = HeldBases(editor, store, library, memory, write=options.keep_bases)
    engine = Engine(editor, bases, library, records=options.keep_bases)
    worker = Worker(engine, options.batch)
    if not options.keep_bases:
        worker.begin(lambda: _draw_some(engine, facts_of(editor).side))
    gc.collect()
    gc.freeze()  # modules and graphs stay: to search them for garbage would stop a request for a third of a second
    return worker


def facts_of(editor: Editor) -> PipelineFacts:
    """What a front has to know of an editor's pipeline."""
    pipe = editor.pipe
    side = pipe.unet.config.sample_size
    factor = pipe.vae_scale_factor
    return PipelineFacts(editor.digest(), (side if isinstance(side, int) else max(side)) * factor, math.lcm(8, factor))


def _draw_some(engine: Engine, side: int) -> None:
    """Draw pictures without their bases, so that what is compiled is there, and recorded by CUDA graphs."""
    for seed in range(_UNTIL_REPLAY):
        engine.artist.unrecorded(_WORDS[0], Settings(side, side, _STEPS, guidance=5.0), seed, None)


def _warm_up(editor: Editor, side: int, batch: int) -> None:
    """Draw a picture and edit it, within masks of some sizes and one that is found, so that graphs and kernels exist.

    Args:
        editor: the editor.
        side: of the picture.
        batch: edits that will be made together at most; there are graphs for each number of them.
    """
    from PIL import Image

    from fisedit_compile.editing.edit_request import EditRequest

    base = editor.generate(
        _WORDS[0], num_inference_steps=_STEPS, generator=torch.Generator().manual_seed(0), width=side, height=side
    )
    masks = [Image.new("L", (100, 100)) for _ in _SIDES_OF_MASKS[editor.pipe.device.type]]
    for mask, share in zip(masks, _SIDES_OF_MASKS[editor.pipe.device.type], strict=True):
        mask.paste(255, (0, 0, round(100 * share), round(100 * share)))
    for count in (2**i for i in range(batch.bit_length())):
        for given in (*masks, None):
            try:
                editor.edit_many([EditRequest(base, _WORDS[1], given)] * count)
            except (FiseditError, ValueError) as error:  # a model to which both are one word, or that changes nothing
                logger.info("edits before the first request: %s", error)
