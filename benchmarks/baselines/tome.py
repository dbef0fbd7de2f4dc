"""Token merging (ToMe): half of the tokens of the highest resolution are merged before self-attention.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023; their own package. It speeds
up the making of a whole picture: what a user may take instead of editing a part.
"""

from __future__ import annotations

from importlib import import_module

from baselines.method import NotInstalledError
from baselines.models import Kit
from baselines.text_to_image import TextToImage

#: Share of tokens merged; the package's default.
RATIO = 0.5


class TokenMerging(TextToImage):
    title = f"ToMe, {RATIO:.0%} merged"
    source = "Bolya and Hoffman 2023; PyPI tomesd"

    def __init__(self, kit: Kit) -> None:
        try:
            tomesd = import_module("tomesd")
        except ModuleNotFoundError as error:
            raise NotInstalledError("pip install tomesd") from error
        super().__init__(kit)
        tomesd.apply_patch(self.pipe, ratio=RATIO)
