"""DeepCache: deep features are kept for a few steps, in which only the outermost blocks run.

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024; the code is the authors' package. It
speeds up generating a whole picture, which a user may do instead of editing a part of one.
"""

from __future__ import annotations

from importlib import import_module

from baselines.method import NotInstalledError
from baselines.models import Kit
from baselines.text_to_image import TextToImage

#: Every third call is full, and the others run the outermost branch alone: the settings that its README starts with.
INTERVAL, BRANCH = 3, 0


class DeepCache(TextToImage):
    title = f"DeepCache, interval {INTERVAL}"
    source = "Ma et al. 2024; PyPI DeepCache"

    def __init__(self, kit: Kit) -> None:
        try:
            helper = import_module("DeepCache").DeepCacheSDHelper
        except ModuleNotFoundError as error:
            raise NotInstalledError("pip install DeepCache") from error
        super().__init__(kit)
        self._helper = helper(pipe=self.pipe)
        self._helper.set_params(cache_interval=INTERVAL, cache_branch_id=BRANCH)
        self._helper.enable()

    def kind(self, index: int) -> str:
        return "shallow" if index % INTERVAL else "full"
