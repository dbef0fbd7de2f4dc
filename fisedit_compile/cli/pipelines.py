"""The options ``--model`` and ``--scheduler``, and the pipeline that they name."""

from __future__ import annotations

import argparse
import difflib
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
    kind = None if scheduler is None else scheduler_class(scheduler)

    from fisedit_compile.editing.plain_pipeline import load_pipeline
    from fisedit_compile.editing.schedulers import SCHEDULERS

    logger.info("loading %s ...", model)
    pipe = load_pipeline(model, device, dtype)
    if kind is not None and type(pipe.scheduler) is not kind:
        own = type(pipe.scheduler).__name__
        if own not in SCHEDULERS:  # one whose config says something else, such as EDM's or flow matching's
            raise ValueError(f"--scheduler {scheduler}: the model is drawn with {own}, which no other can stand for")
        try:
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
        except ImportError as error:  # one of diffusers' that needs torchsde or scipy
            raise ValueError(f"--scheduler {scheduler}: {' '.join(str(error).split())}") from None
    return pipe


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers of this name, of those that Stable Diffusion's models can be drawn with.

    Raises:
        ValueError: another name; the message has the nearest.
    """
    import diffusers

    from fisedit_compile.editing.schedulers import SCHEDULERS

    if name not in SCHEDULERS:
        by_lower = {known.lower(): known for known in SCHEDULERS}
        nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.3)
        hint = f"did you mean {by_lower[nearest[0]]}? " if nearest else ""
        raise ValueError(f"--scheduler {name}: {hint}Known are {', '.join(SCHEDULERS)}")
    return getattr(diffusers, name)
