"""The pictures of a case: the base, dense edits by length of control, and each variant with its own reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.background import PixelBackground
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.editor import Editor
from fisedit_compile.editing.result import Edit
from fisedit_compile.editing.stride import Stride
from fisedit_compile.quality.cases import Case


@dataclass(frozen=True)
class DenseEdit:
    """A dense edit of the whole picture: the picture, and its final latents ``[c, h, w]`` on the host."""

    picture: Any
    latents: Tensor


@dataclass(frozen=True)
class VariantEdit:
    """A sparse edit by one variant of the config.

    Attributes:
        picture: of the edit.
        under_mask: the dense U-Net's, under the same mask, with the same steps, control and background.
        mask: what was edited, bool ``[h, w]``.
        latents_equal: whether the latents outside the mask are the base's, bit for bit.
        far_pixels_equal: share of the pixels that are to be the base's which are, bit for bit.
        reach: pixels around the mask up to which the picture is not the base's.
    """

    picture: Any
    under_mask: Any
    mask: Tensor
    latents_equal: bool
    far_pixels_equal: float
    reach: int


@dataclass(frozen=True)
class CaseRun:
    """All pictures of one case.

    Attributes:
        case: the case.
        base: the picture before.
        base_latents: its final latents ``[c, h, w]``, on the host.
        dense: length of control -> the dense edit; a length of 0 is the plain new picture.
        variants: name -> the sparse edit.
    """

    case: Case
    base: Any
    base_latents: Tensor
    dense: Mapping[float, DenseEdit]
    variants: Mapping[str, VariantEdit]


@dataclass(frozen=True)
class RunSettings:
    """How cases are drawn.

    Attributes:
        variants: name -> config of the editor that is measured.
        controls: lengths of Prompt-to-Prompt control of the dense edits, shares of the steps; 0 is always among them.
        reference_stride: which steps of their base the dense edits visit; 1 is all.
        steps: denoising steps.
        guidance: guidance scale.
    """

    variants: Mapping[str, SparsityConfig]
    controls: Sequence[float]
    reference_stride: Stride
    steps: int
    guidance: float


class CaseRunner:
    """Draws cases with one pipeline.

    Args:
        pipe: the pipeline.
        settings: how.

    Raises:
        ValueError: a pipeline whose pictures are not square by default, as those of the cases are.
    """

    def __init__(self, pipe: Any, settings: RunSettings) -> None:
        size = pipe.unet.config.sample_size
        if not isinstance(size, int) and len(set(size)) > 1:
            raise ValueError(f"the model draws pictures of {size[0]}x{size[1]} latent cells, and the cases are square")
        steps = settings.steps
        self._controls = sorted({0.0, *settings.controls})
        longest = {"dense_steps": steps, "cross_replace": self._controls[-1], "stride": settings.reference_stride}
        self._reference = Editor(pipe, longest)
        self._editors = {name: Editor(pipe, config) for name, config in settings.variants.items()}
        self._arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": settings.guidance}

    def run(self, case: Case) -> CaseRun:
        """Draw one case.

        Raises:
            FiseditError: a base that does not fit, or no mask that can be found.
        """
        base = self._generate(self._reference, case)
        dense = {control: self._dense(base, case, control) for control in self._controls}
        picture, latents = base.image, base.latents[0].cpu()
        del base
        references: list[tuple[Edit, SparsityConfig]] = []
        variants = {name: self._variant(editor, case, references) for name, editor in self._editors.items()}
        return CaseRun(case, picture, latents, dense, variants)

    def _generate(self, editor: Editor, case: Case) -> Base:
        generator = torch.Generator("cpu").manual_seed(case.seed)  # on the CPU: the same noise for every device
        return editor.generate(case.prompt, generator=generator, **self._arguments)

    def _dense(self, base: Base, case: Case, control: float) -> DenseEdit:
        edit = self._reference.edit(base, case.edit, dense=True, cross_replace=control, background="latents")
        return DenseEdit(edit.image, edit.latents[0].cpu())

    def _variant(self, editor: Editor, case: Case, references: list[tuple[Edit, SparsityConfig]]) -> VariantEdit:
        base = self._generate(editor, case)
        edit = editor.edit(base, case.edit)
        under = self._under_mask(editor, base, case, edit, references)
        keep = PixelBackground.of(editor.pipe, base.pictures, base.latents, base.arguments)
        far = keep.weights(edit.mask.cpu())[0] == 0
        same = (_levels(edit.image) == _levels(base.image)).all(-1)
        return VariantEdit(
            picture=edit.image,
            under_mask=under.image,
            mask=edit.mask[0].cpu(),
            latents_equal=edit.report.background_identical,
            far_pixels_equal=float(same[far].float().mean()) if far.any() else 1.0,
            reach=keep.grown + keep.feathered,
        )

    def _under_mask(
        self, editor: Editor, base: Base, case: Case, edit: Edit, known: list[tuple[Edit, SparsityConfig]]
    ) -> Edit:
        """The dense U-Net under the mask of ``edit``; what attends to what makes no difference to it."""
        for other, config in known:
            if _same_dense_edit(config, editor.config) and torch.equal(other.mask, edit.mask):
                return other
        under = editor.edit(base, case.edit, mask=edit.mask, dense=True)
        known.append((under, editor.config))
        return under


def _same_dense_edit(one: SparsityConfig, other: SparsityConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("dense_steps", "cross_replace", "stride"))


def _levels(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB")))
