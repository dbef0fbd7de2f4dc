"""What happens at each U-Net call and at the end of each step while a pipeline records a base."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.host_tier import HostMemory
from fisedit_compile.cache.memory import free_bytes, require_room
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.arguments import owned
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.decoding import RecordDecoding
from fisedit_compile.editing.disk_record import DiskRecord
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.editing.pipeline_run import PipelineRun
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.prompt_tokens import check_text_length, own_tokens
from fisedit_compile.editing.recorded_call import RecordedCall
from fisedit_compile.editing.schedule import refuse_noise_of_its_own
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.stride import (
    SolverStep,
    choose_stride,
    visited_steps,
    watch_steps,
    why_not,
)
from fisedit_compile.errors import BaseMemoryError, CaptureError
from fisedit_compile.ir.call import Call
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.frozen_mapping import FrozenMapping

logger = logging.getLogger(__name__)


class RecordRun(PipelineRun):
    """Generates a base: every call dense, with what edits read kept from it.

    Args:
        unet, pipe, tokenizers, callback: see :class:`~fisedit_compile.editing.pipeline_run.PipelineRun`.
        config: the editor's.
        arguments: of the pipeline's call.
        trajectory: the latents that each step has to lead to, ``[n, c, h, w]``, whatever the scheduler makes of it;
            None for a generation of its own.
        disk: takes what the calls keep, to be saved with the base; None keeps it in memory.
    """

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        callback: StepCallback | None,
        config: SparsityConfig,
        arguments: Mapping[str, Any],
        trajectory: Sequence[Tensor] | None = None,
        disk: DiskRecord | None = None,
    ) -> None:
        super().__init__(unet, pipe, tokenizers, callback)
        self.calls: list[RecordedCall] = []
        self.visits: tuple[int, ...] = ()
        self._config, self._arguments, self._trajectory = config, arguments, trajectory
        self._steps = self._dense_visits = self._controlled_visits = 0
        self._solver_steps: list[SolverStep] = []
        self._prompts: tuple[str, ...] = ()
        self._tokens: int | None = None  # whose attention maps are kept
        self._host: HostMemory | None = None  # where the base lies, if neither on the device nor on the disk
        self._disk = disk

    def record(
        self,
        prompts: tuple[str, ...],
        generators: list[torch.Generator],
        state: PipelineState,
        photos: Any = None,
        frame: PhotoFrame | None = None,
    ) -> Base:
        """The base that the run makes.

        Args:
            prompts: one a picture.
            generators: of the noise.
            state: of the pipeline's models; their weights are read after the run.
            photos: the base's pictures where they are not what the pipeline decodes.
            frame: what of them the pipeline draws, where that is not all of them.

        Raises:
            BaseMemoryError: memory ran out, though there was enough when the first step began; nothing is kept.
        """
        self._prompts = prompts
        states = tuple((each.get_state(), each.device) for each in generators)
        start = time.perf_counter()
        output = {}
        if photos is not None:  # what their latents are decoded to is not shown, but read by edits
            output["output_type"] = "pt" if isinstance(self.decoding, RecordDecoding) else "latent"
        try:
            images, nsfw = self.draw(prompts, generators, {**self._arguments, **output})
        except torch.OutOfMemoryError as error:
            self.calls.clear()
            raise BaseMemoryError(
                f"memory ran out at step {self.step} of a base of {self._steps}: let go of other bases and graphs "
                f"(editor.free()), or keep it in host memory or in fewer bits (Editor(pipe, {{'tier': 'host'}}) or "
                f"{{'cache': 'small'}}); {error}"
            ) from error
        if self._host is not None:
            self._host.finish()
        seconds = time.perf_counter() - start
        state.read_weights()
        images, nsfw = (images, nsfw) if photos is None else (owned(photos), None)
        return Base(
            images=images,
            nsfw=nsfw,
            prompts=prompts,
            step_latents=tuple(self.latents),
            arguments=FrozenMapping(self._arguments),
            generators=states,
            calls=tuple(self.calls),
            pipeline=state,
            schedule=self.schedule,
            visits=self.visits,
            solver_steps=self.solver_steps,
            callback=self.callback_changes,
            config=self._config,
            seconds=seconds,
            unet_ms=tuple(self.timer.milliseconds()["record"]),
            pictures=owned(images) if frame is None else frame.pictures(),
            frame=frame,
            decoded=self.decoding.decoded if isinstance(self.decoding, RecordDecoding) else None,
        )

    def begin(self, call: Call) -> None:
        # Of the loop itself: Heun's scheduler makes two steps of one, a picture to start from saves some.
        self._steps = getattr(self.pipe, "num_timesteps", None) or len(self.schedule.timesteps)
        self.visits = self.choose_visits()
        self._dense_visits = self._config.count_dense_steps(len(self.visits))
        self._controlled_visits = self._config.count_controlled_steps(len(self.visits))
        if self._controlled_visits:
            length = call.kwargs["encoder_hidden_states"].shape[1]
            check_text_length(self.pipe, length)
            self._tokens = min(length, own_tokens(self.pipe, self._prompts, self._arguments))
        self._host = self._choose_tier(call)
        if self._trajectory is not None and len(self._trajectory) != self._steps:
            raise CaptureError(
                f"{type(self.pipe).__name__} makes {self._steps} steps, and made {len(self._trajectory)} before"
            )
        if (len(self.visits) < self._steps or self._trajectory is not None) and self._dense_visits:
            self._solver_steps = watch_steps(self.pipe.scheduler)
        refuse_noise_of_its_own(self.pipe.scheduler)

    def choose_visits(self) -> tuple[int, ...]:
        """The steps that edits of the base visit, as positions among those of the loop."""
        return visited_steps(self._steps, choose_stride(self._config.stride, self._steps, self._why_all()))

    @property
    def base_step(self) -> int:
        """The step that is being computed, as a position among those of the base."""
        return self.step

    def _why_all(self) -> str:
        """Why edits have to visit every step; empty where they need not."""
        reason = why_not(self.pipe.scheduler, loop_steps=self._steps, arguments=self._arguments)
        if not reason and self.callback and self.callback.official:
            reason = f"{self.callback.name} may change the loop at a step that an edit would not visit"
        return reason

    @property
    def _sparse_visits(self) -> int:
        """How many steps may be sparse: all of them with a mask that is given, unless the config makes all dense.

        A single step is no step to find a mask from, whatever the config says: an edit of it brings one.
        """
        return len(self.visits) if self._dense_visits < len(self.visits) or len(self.visits) == 1 else 0

    @property
    def solver_steps(self) -> tuple[SolverStep, ...]:
        """What the scheduler was given at the visited dense steps; empty where its own steps lead through the base."""
        visited = self.visits[: self._dense_visits] if self._solver_steps else ()
        return tuple(self._solver_steps[step] for step in visited)

    def predict(self, call: Call) -> Tensor:
        visit = self.visits.index(self.step) if self.step in self.visits else None

        samples, part = self.parts(call)

        def record() -> Tensor:
            if visit is None:
                return self.unet.dense(call)
            # Where any step is controlled all make maps, though those of the last ones are let go of: a graph of their
            # own would take seconds to make, and maps take a few per cent of a step's time.
            out, kept = self.unet.record(
                call,
                samples=samples,
                part=part,
                activations=bool(self._sparse_visits),
                attention=bool(self._controlled_visits),
                tokens=self._tokens,
            )
            if visit >= self._controlled_visits:
                kept = kept.without("attention")
            self.calls.append(self._kept(kept))
            return out

        return self.timer.time("record", call.tensors[0].device, record)

    def _kept(self, cache: Recorded) -> RecordedCall:
        """What was recorded at this step, on its way to where the base lies."""
        if self._disk is not None:
            return self._disk.take(self.base_step, cache)
        return RecordedCall(self.base_step, cache if self._host is None else self._host.take(cache))

    def finish_step(self, latents: Tensor) -> Tensor:
        if self.callback_changes and len(self.visits) < self._steps:
            raise ValueError(
                f"the callback {self.callback_changes}, runs at all {self._steps} steps here and at the "
                f"{len(self.visits)} that an edit visits there, which is not the same: Editor(pipe, {{'stride': 1}})"
            )
        return latents if self._trajectory is None else self._trajectory[self.step].to(latents)

    @property
    def expected_steps(self) -> int:
        return self._steps

    def finish(self) -> None:
        if len(self.latents) != self._steps:
            raise CaptureError(
                f"{type(self.pipe).__name__} made {len(self.latents)} of {self._steps} steps: a base needs all of them"
            )

    def _choose_tier(self, call: Call) -> HostMemory | None:
        """Where the base will lie: None is the device, or the disk. Its memory is held to what is free there.

        Raises:
            BaseMemoryError: it would take more than is free.
            BaseStorageError: the same, of the disk.
        """
        device, calls, latents = call.tensors[0].device, self._calls_nbytes(call), self._latents_nbytes(call)
        if self._disk is not None:
            self._require_room(latents, device, call)
            self._disk.writer.check_room(calls + latents)
            return None
        if device.type == "cpu" or self._config.tier == "device":
            self._require_room(calls + latents, device, call)
            return None
        if self._config.tier == "auto" and calls + latents <= free_bytes(device):
            return None
        self._require_room(latents, device, call)
        self._require_room(calls, torch.device("cpu"), call)
        if self._config.tier == "auto":
            logger.info("a base of %.1f GiB does not fit on %s: it lies in host memory", calls / 2**30, device)
        return HostMemory(device)

    def _calls_nbytes(self, call: Call) -> int:
        """Memory of what all calls will keep."""
        lowered, (samples, _) = self.unet.program(call).lowered, self.parts(call)
        activations = lowered.kept.record_nbytes(samples=samples, activations=True, attention=False)
        maps = lowered.kept.record_nbytes(samples=samples, activations=False, attention=True, tokens=self._tokens)
        return self._sparse_visits * activations + self._controlled_visits * maps

    def _latents_nbytes(self, call: Call) -> int:
        return self._steps * call.tensors[0].nbytes * self.parts(call)[0] // call.signature.sample_shape[0]

    def _require_room(self, nbytes: int, device: torch.device, call: Call) -> None:
        """Hold memory that the base will take to what is free."""
        samples = self.parts(call)[0]
        options = [f"fewer than {self._steps} steps", "a smaller height and width"]
        options += [f"fewer than {samples} pictures at a time"] if samples > 1 else []
        options += ["half precision (torch_dtype)"] if call.tensors[0].dtype.itemsize > 2 else []
        options += ["Editor(pipe, {'attention': 'masked'})"] if self._config.attention == "full" else []
        options += ["Editor(pipe, {'cache': 'small'})"] if self._config.cache != "small" else []
        options += ["Editor(pipe, {'tier': 'host'})"] if device.type == "cuda" and self._config.tier == "device" else []
        options += ["a lower cross_replace"] if self._controlled_visits else []
        options += ["a stride above 1"] if len(self.visits) == self._steps and not self._why_all() else []
        require_room(nbytes, device, f"A base of {self._steps} steps", options)
