"""The graphs of a decoder on a device: one that records what a base keeps, and one that decodes a region."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.compiler.lower import lower
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.call import Call
from fisedit_compile.passes.manager import DECODER_PASSES, DECODER_PASSES_ON_HOST
from fisedit_compile.planning.edit_plan import EditPlan
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.program import Program
from fisedit_compile.runtime.stage import Stage
from fisedit_compile.vae.decoder import Decoder


class DecoderProgram(Program):
    """A lowered decoder on a device.

    The level of the latents is computed whole: it has a tenth of the work, and its attention and norms are exact then.

    Args:
        decoder: what is exported.
        call: a call of it, whose tensors lie where the program runs.
        watch: of the decoder's VAE.

    Raises:
        CaptureError: it cannot be exported, or not all that lies behind the latents' level can run on rows.
        SparsifyError: there is no level behind that of the latents.
    """

    def __init__(self, decoder: Decoder, call: Call, watch: ModelWatch) -> None:
        smaller_side = min(call.signature.sample_shape[2:])
        passes = DECODER_PASSES if call.tensors[0].is_cuda else DECODER_PASSES_ON_HOST
        config = SparsityConfig(dense_below=smaller_side + 1, dense_above=1.0, cache="exact")
        lowered = lower(decoder, call, config, passes, form=watch.form(), holding=watch.left_alone("the VAE"))
        maps = [entry.node for entry in lowered.kept.cache_entries if entry.kind not in ("scale", "shift")]
        if lowered.output is None or maps != [lowered.output[0].node]:
            raise CaptureError(f"not all of the decoder of {type(decoder.vae).__name__} can run on rows ({maps})")
        super().__init__(lowered, lowered.weights_of(decoder), call.tensors[0], plan_on_device=True)
        # Of the pool of higher priority: torch hands the streams of a pool out in turns, and those on which graphs are
        # captured, where nothing else may run meanwhile, are of the common one.
        self._aside = torch.cuda.Stream(self._device, priority=-1) if self._device.type == "cuda" else None
        self._packed: torch.cuda.Event | None = None
        # Not a CUDA graph: it runs once a base, and would hold the memory of a whole decode.
        self._recorder = Stage(lowered.recording(lowered.kept.cache_entries, lowered.batch, -1), compiled=False)

    def plan(self, mask: Tensor) -> EditPlan:
        """The plan of a mask on the host, made on the device beside what that still computes.

        Planning waits for counts of rows, which on the current stream would come behind all that was launched before.
        """
        if self._aside is None:
            return super().plan(mask)
        if self._packed is not None:  # what was planned last is freed by now, and read until then
            self._aside.wait_event(self._packed)
        with torch.cuda.stream(self._aside):
            plan = super().plan(mask)
        torch.cuda.current_stream(self._device).wait_stream(self._aside)
        return plan

    def prepare(self, mask: Tensor) -> Prepared:
        prepared = super().prepare(mask)
        if self._aside is not None:
            self._packed = torch.cuda.current_stream(self._device).record_event()
        return prepared

    def decode_whole(self, call: Call) -> tuple[Tensor, Recorded]:
        """The picture as the autoencoder itself decodes it, and what decodes of regions read."""
        out, kept = self._recorder({**self._user_values(call), **self.weights})
        return out, Recorded(self.signature, (), dict(zip(self.lowered.kept.cache_entries, kept, strict=True)))
