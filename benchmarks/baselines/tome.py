"""Token merging (ToMe): half of the tokens of the highest resolution are merged before self-attention.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023; the code is the authors'
package. It speeds up generating a whole picture, which a user may do instead of editing a part of one.
"""

from __future__ import annotations

from importlib import import_module

from baselines.method import NotInstalledError
from baselines.models import Kit
from baselines.text_to_image import TextToImage

#: The share of tokens that are merged; the package's default.
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
