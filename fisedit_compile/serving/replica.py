"""One replica: a pipeline, its editor, and the engine and worker over them, from the options of a service."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fisedit_compile.cache.memory import free_bytes
from fisedit_compile.config import SparsityConfig
from fisedit_compile.serving.engine import Engine
from fisedit_compile.serving.held_bases import HeldBases, open_library, open_store
from fisedit_compile.serving.warm_up import draw_edits, draw_unrecorded
from fisedit_compile.serving.worker import Worker

if TYPE_CHECKING:
    from fisedit_compile.editing.editor import Editor

#: Share of the free memory that bases may take, where no other limit is given: on a GPU, which a replica has alone, and
#: on the host.
_SHARES = {"cuda": 0.5, "cpu": 0.25}

#: Seconds that a base waits until it is written beside pictures that are drawn. Those of a GPU wait for the host, which
#: writing keeps busy, and a base is drawn again in less time than it is written; beside a CPU's it goes unnoticed.
_PATIENCE = {"cuda": 60.0, "cpu": 0.0}

#: The mode of ``torch.compile`` that draws fastest (docs/performance.md): with CUDA graphs.
_COMPILE_MODE = "reduce-overhead"


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
    side = facts_of(editor).side
    if options.keep_bases:
        draw_edits(editor, side, options.batch)
    kind, memory = pipe.device.type, options.memory_bytes
    if memory is None:
        memory = int(_SHARES[kind] * free_bytes(pipe.device) / (options.replicas if kind == "cpu" else 1))
    patience = _PATIENCE[kind]
    bases = HeldBases(editor, store, library, memory, write=options.keep_bases, patience=patience)
    engine = Engine(editor, bases, library, records=options.keep_bases)
    worker = Worker(engine, options.batch)
    if not options.keep_bases:
        worker.begin(lambda: draw_unrecorded(engine.artist, side))
    gc.collect()
    gc.freeze()  # modules and graphs stay: to search them for garbage would stop a request for a third of a second
    return worker


def facts_of(editor: Editor) -> PipelineFacts:
    """What a front has to know of an editor's pipeline."""
    pipe = editor.pipe
    side = pipe.unet.config.sample_size
    factor = pipe.vae_scale_factor
    return PipelineFacts(editor.digest(), (side if isinstance(side, int) else max(side)) * factor, math.lcm(8, factor))
