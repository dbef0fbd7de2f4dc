"""The options ``--model`` and ``--scheduler``, and the pipeline that they name."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|HUB-ID",
        help="folder of a diffusers pipeline, or its name on the Hugging Face Hub, such as "
        "stabilityai/stable-diffusion-2-1, from where it is downloaded once",
    )


def add_scheduler_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--scheduler``."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help="class of diffusers, such as DPMSolverMultistepScheduler, made of the config of the model's own "
        "(default: the model's own)",
    )


def open_pipeline(model: str, scheduler: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of ``--model`` with the scheduler of ``--scheduler``.

    Raises:
        ValueError: no such pipeline, or no such scheduler, which is found before anything is loaded.
        OSError: a file of the pipeline is missing, or it cannot be downloaded.
    """
    if scheduler is not None:
        from fisedit_compile.editing.schedulers import exchange_scheduler, scheduler_class

        scheduler_class(scheduler)  # before anything is loaded

    from fisedit_compile.editing.plain_pipeline import load_pipeline

    logger.info("loading %s ...", model)
    pipe = load_pipeline(model, device, dtype)
    if scheduler is not None:
        exchange_scheduler(pipe, scheduler)
    return pipe
