"""DeepCache: deep features are kept for a few steps, between which only the outermost blocks run.

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024; their own package. It speeds up the
making of a whole picture: what a user may take instead of editing a part.
"""

from __future__ import annotations

from importlib import import_module

from baselines.method import NotInstalledError
from baselines.models import Kit
from baselines.text_to_image import TextToImage

#: A full call every third step, the outermost branch between: what its README starts from.
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
