"""The paper's figures by CLIP: how near an edit stays to its base, and how well it follows the change of the words.

Sources: image-image and directional similarity as in section B.2 of FISEdit, after InstructPix2Pix (Brooks, Holynski
and Efros, 2023); CLIP accuracy after Hessel et al., "CLIPScore", 2021, as the share of edits that are nearer to the new
words than to the old ones.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClipFigures:
    """Of one edit.

    Attributes:
        image_similarity: cosine of the embeddings of the base's picture and the edit's.
        directional_similarity: cosine of the step from picture to picture and that from old words to new words.
        follows: whether the edit's picture is nearer to the new words than to the old ones.
    """

    image_similarity: float
    directional_similarity: float
    follows: bool


class Clip:
    """A CLIP model from a local folder.

    Args:
        model: a transformers ``CLIPModel``.
        images: its ``CLIPImageProcessor``.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, images: Any, tokenizer: Any) -> None:
        self._model, self._images, self._tokenizer = model.eval(), images, tokenizer
        self._tokenizing = threading.Lock()  # a fast tokenizer keeps how it is to pad, which threads must not share

    @classmethod
    def load(cls, folder: Path) -> Clip:
        """The model, image processor and tokenizer that ``save_pretrained`` wrote to ``folder``; nothing is downloaded.

        Raises:
            ValueError: there is none.
        """
        import transformers

        try:
            # On the CPU, and in single precision, whatever the weights were saved in.
            model = transformers.CLIPModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
            images = transformers.CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is no folder of a CLIP model with its image processor and tokenizer: give one that has them"
            ) from error
        return cls(model, images, tokenizer)

    def score(self, base: Any, edit: Any, prompt: str, edit_prompt: str) -> ClipFigures:
        """The figures of one edit.

        Args:
            base, edit: PIL images.
            prompt, edit_prompt: words before and after.
        """
        images, texts = self._embed([base, edit], [prompt, edit_prompt])
        nearness = images[1] @ texts.T
        return ClipFigures(
            image_similarity=float(F.cosine_similarity(images[0], images[1], dim=0)),
            directional_similarity=float(F.cosine_similarity(images[1] - images[0], texts[1] - texts[0], dim=0)),
            follows=bool(nearness[1] > nearness[0]),
        )

    @torch.no_grad()
    def features(self, pictures: Sequence[Any]) -> Tensor:
        """Unit vectors ``[n, d]`` of PIL images, such as FID is computed over."""
        found = []
        for picture in pictures:
            pixels = self._images(picture.convert("RGB"), return_tensors="pt").pixel_values
            found.append(self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output))
        return F.normalize(torch.cat(found), dim=1)

    @torch.no_grad()
    def _embed(self, pictures: Sequence[Any], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[n, d]`` of each."""
        pixels = self._images([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        with self._tokenizing:
            words = self._tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        output = self._model(
            input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels.pixel_values
        )
        return output.image_embeds, output.text_embeds
