"""What decodes the final latents of a run, in the place of the pipeline's VAE."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from fisedit_compile.editing.background import PixelBackground
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.errors import CaptureError
from fisedit_compile.masks.grown import grown
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.vae.decoded import Decoded
from fisedit_compile.vae.decoder import can_be_sparse
from fisedit_compile.vae.sparse_decoder import SparseDecoder

logger = logging.getLogger(__name__)

_NO_DECODER = "the base keeps nothing of its decoder"


class Decoding:
    """Leaves the final latents of a run to the VAE.

    Args:
        why: the reason, which reports name.

    Attributes:
        how: ``"none"`` as long as nothing was decoded, then ``"sparse"``, or ``"dense"`` and the reason in brackets.
    """

    def __init__(self, why: str) -> None:
        self.how = "none"
        self._why = why

    def __call__(self, latents: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The pictures ``[n, 3, H, W]`` of latents as ``vae.decode`` takes them; None leaves them to the VAE.

        Args:
            latents: of the run, ``[n, c, h, w]``.
            mask: of an edit, bool ``[n, h, w]`` on the host: the cells in which its latents are others than the base's.
        """
        self.how = f"dense ({self._why})"
        return None


class RecordDecoding(Decoding):
    """Decodes the pictures of a base, and keeps what its edits need.

    Args:
        decoder: of the pipeline's VAE.
        state: of the VAE.

    Attributes:
        decoded: what was kept; None where no graph can stand for the decoder as it is.
    """

    def __init__(self, decoder: SparseDecoder, state: ModelState) -> None:
        super().__init__("")
        self.decoded: Decoded | None = None
        self._decoder, self._state = decoder, state

    def __call__(self, latents: Tensor, mask: Tensor | None = None) -> Tensor | None:
        try:
            picture, self.decoded = self._decoder.record(latents, self._state)
        except CaptureError as error:
            logger.info("edits of this base will decode their whole pictures: %s", error)
            return None
        return picture


class EditDecoding(Decoding):
    """Decodes what an edit changed, and around it.

    Args:
        decoder, state: see :class:`RecordDecoding`.
        base: what the base kept.
        grown: latent cells around the mask that are decoded with it.
    """

    def __init__(self, decoder: SparseDecoder, state: ModelState, base: Decoded, grown: int) -> None:
        super().__init__("")
        self._decoder, self._state, self._base, self._grown = decoder, state, base, grown

    def __call__(self, latents: Tensor, mask: Tensor | None = None) -> Tensor | None:
        assert mask is not None
        try:
            prepared = self._decoder.prepare(latents, self._base, self._state, grown(mask, self._grown))
        except CaptureError as error:
            self._why = str(error)
            return super().__call__(latents)
        self.how = "sparse"
        return self._decoder.decode(latents, self._base, prepared)


class Decoders:
    """Says what decodes the runs of an editor; it keeps the sparse decoder of the last VAE."""

    def __init__(self) -> None:
        self._decoder: SparseDecoder | None = None

    def recording(self, pipe: Any, state: PipelineState) -> Decoding:
        """For the run that makes a base.

        Args:
            pipe: the editor's pipeline.
            state: of its models, just taken.
        """
        decoder = self._of(pipe)
        return Decoding(_NO_DECODER) if decoder is None else RecordDecoding(decoder, state.models["vae"])

    def editing(self, pipe: Any, state: PipelineState, base: Base, background: PixelBackground | None) -> Decoding:
        """For the run of an edit.

        Args:
            pipe, state: see :meth:`recording`.
            base: of the edit.
            background: how its pictures will be put together with the base's; None where they will not.
        """
        decoder = self._of(pipe)
        if background is None:
            return Decoding("background='latents'")
        if decoder is None or base.decoded is None:
            return Decoding(_NO_DECODER)
        return EditDecoding(decoder, state.models["vae"], base.decoded, background.cells(base.latents))

    def _of(self, pipe: Any) -> SparseDecoder | None:
        """That of the pipeline's VAE as it is now; None where it can only be dense."""
        vae = getattr(pipe, "vae", None)
        if vae is None or not can_be_sparse(vae):
            self._decoder = None
        elif self._decoder is None or self._decoder.vae is not vae:
            self._decoder = SparseDecoder(vae)
        return self._decoder
