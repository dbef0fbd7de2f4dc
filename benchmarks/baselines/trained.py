"""The parts of a trained pipeline, for methods that really edit; what :class:`baselines.models.Kit` is for timing."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler


class TrainedKit:
    """Gives a method the models of a pipeline, which stays as it is.

    Args:
        pipe: a Stable Diffusion pipeline. Its scheduler's noise schedule is taken, under DDIM.
    """

    counting = False

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @property
    def device(self) -> torch.device:
        return self._pipe.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self._pipe.unet.dtype

    @property
    def unet_device(self) -> torch.device:
        """The device that the layers of the U-Net run on."""
        return self.device

    def unet(self, in_channels: int = 4) -> Any:
        """The U-Net, a copy for all methods of this kit, whose attention they may change.

        Raises:
            ValueError: the pipeline's takes another number of channels, for which it would have to be trained.
        """
        if self._unet.config.in_channels != in_channels:
            raise ValueError(
                f"the method needs a U-Net of {in_channels} input channels, and this model's has "
                f"{self._unet.config.in_channels}: give one that was trained for the method"
            )
        return self._unet

    @cached_property
    def _unet(self) -> Any:
        unet = copy.deepcopy(self._pipe.unet)
        # The layout that cuDNN prefers, as in Table A1.
        return unet.to(memory_format=torch.channels_last) if self.device.type == "cuda" else unet

    @property
    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler.from_config(self._pipe.scheduler.config)

    @property
    def inverse_scheduler(self) -> DDIMInverseScheduler:
        return DDIMInverseScheduler.from_config(self._pipe.scheduler.config)

    def pipeline(self, kind: Any, unet: Any, **more: Any) -> Any:
        """A pipeline of class ``kind`` around ``unet``, without safety checker, and silent."""
        models = {name: getattr(self._pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
        own = {"scheduler": self.scheduler, "safety_checker": None, "feature_extractor": None}
        made = kind(**models, unet=unet, **{**own, **more}, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made
