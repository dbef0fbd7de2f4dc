"""Decodes what an edit changed of a picture, by the passes and row kernels that make U-Nets sparse.

The levels behind that of the latents are rows under the cells that changed and some around them. Their norms take the
base's statistics, and convolutions read nothing of the base, whose maps would take gigabytes: where a tap would read a
pixel beyond the rows it reads the nearest row. That is wrong near the region's rim alone, so the region is grown until
its rim lies where the base's pixels are shown.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.errors import CaptureError, SparsifyError
from fisedit_compile.ir.call import Call, Signature, bind
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.programs import Programs
from fisedit_compile.vae.decoded import Decoded
from fisedit_compile.vae.decoder import Decoder, refuse_as_it_is
from fisedit_compile.vae.program import DecoderProgram

#: Share of the picture above which decoding the region takes as long as decoding the whole, by the kind of device. On
#: the CPU a convolution of rows takes twice as long a pixel as a dense one (docs/decisions.md, 2026-11-27).
DENSE_ABOVE = {"cpu": 0.5, "cuda": 0.9}


class SparseDecoder:
    """The decoder of one autoencoder, which is left as it is; graphs are made on first use.

    Calls of an instance have to be made one after the other.

    Args:
        vae: a diffusers autoencoder for which :func:`~fisedit_compile.vae.decoder.can_be_sparse` is true.
    """

    def __init__(self, vae: torch.nn.Module) -> None:
        self.vae = vae
        self._decoder = Decoder(vae)
        self._programs: Programs[DecoderProgram] = Programs(self._build)
        self._refused: dict[tuple[str, Signature], str] = {}
        self._state: ModelState | None = None

    @property
    def captures(self) -> int:
        """How many CUDA graphs were captured: one for each bucket of sizes that a region has met."""
        return sum(program.captures for program in self._programs)

    def record(self, latents: Tensor, state: ModelState) -> tuple[Tensor, Decoded]:
        """The pictures ``[n, 3, H, W]`` of a base, as the autoencoder decodes them, and what it keeps for its edits.

        Args:
            latents: as ``vae.decode`` takes them, ``[n, c, h, w]``.
            state: of the autoencoder, taken in this process some time before.

        Raises:
            CaptureError: no graph can stand for the decoder as it is; the message is the reason alone.
        """
        call, program, now = self._program(latents, state)
        with torch.no_grad():
            picture, cache = program.decode_whole(call)
        cache.model = now
        return picture, Decoded(latents.clone(), cache)

    def prepare(self, latents: Tensor, base: Decoded, state: ModelState, region: Tensor) -> Prepared:
        """Everything about a region that its decodes need. On a GPU nothing waits for what makes the latents.

        Args:
            latents, state: see :meth:`record`.
            base: what :meth:`record` returned.
            region: the cells to be decoded, bool ``[n, h, w]``, on the host.

        Raises:
            CaptureError: see :meth:`record`; or the autoencoder or the latents are others than the base's in kind, or
                most of the picture would be decoded.
        """
        _, program, now = self._program(latents, state)
        if base.cache.model is not None and (difference := base.cache.model.difference(now)):
            raise CaptureError(f"the VAE is another one than the base was decoded with ({difference})")
        then = base.latents
        if (then.shape, then.dtype, then.device) != (latents.shape, latents.dtype, latents.device):
            raise CaptureError(
                f"latents {list(latents.shape)} {latents.dtype} on {latents.device}, those of the base are "
                f"{list(then.shape)} {then.dtype} on {then.device}"
            )
        if (share := float(region.float().mean())) > DENSE_ABOVE[latents.device.type]:
            raise CaptureError(f"{share:.0%} of the picture would be decoded")
        prepared = program.prepare(region)
        prepared.model = now
        return prepared

    def decode(self, latents: Tensor, base: Decoded, prepared: Prepared) -> Tensor:
        """The pictures ``[n, 3, H, W]``: decoded in the region that was prepared, elsewhere the base's bit for bit.

        Args:
            latents: as :meth:`prepare` was given them. Cells outside the region are read as well, near its rim.
            base: that of :meth:`prepare`, just before.
        """
        assert prepared.model is not None
        call = bind(self._decoder, (latents,), {})
        with torch.no_grad():
            return self._programs.of(call, prepared.model).step(call, base.cache, prepared)

    def _program(self, latents: Tensor, state: ModelState) -> tuple[Call, DecoderProgram, ModelState]:
        refuse_as_it_is(self.vae, latents)
        watch = None if state.live is None else state.live.watch()
        if watch is None or watch.module is not self.vae:
            raise CaptureError("the VAE was exchanged on the way")
        # On a GPU sampled values would be waited for; the state was taken with a look at them.
        now = self._state = watch.look(values=not latents.is_cuda)
        call = bind(self._decoder, (latents,), {})
        known = (now.behaviour, call.signature)
        if known in self._refused:
            raise CaptureError(self._refused[known])
        try:
            return call, self._programs.of(call, now), now
        except (CaptureError, SparsifyError) as error:
            self._refused[known] = f"the VAE cannot be captured ({error})"
            raise CaptureError(self._refused[known]) from error

    def _build(self, call: Call) -> DecoderProgram:
        assert self._state is not None
        assert self._state.live is not None
        watch = self._state.live.watch()
        assert watch is not None
        return DecoderProgram(self._decoder, call, watch)
