"""What happens at each U-Net call and at the end of each step while a pipeline makes an edit, or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.host_tier import Staging
from fisedit_compile.cache.joined_calls import JoinedCalls
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.editing.batch_call import call_of_rows, check_call, rows_of
from fisedit_compile.editing.decoding import Decoding
from fisedit_compile.editing.dense_edit import DenseEdit
from fisedit_compile.editing.failures import Failures
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.pipeline_run import PipelineRun
from fisedit_compile.editing.recorded_call import RecordedCall
from fisedit_compile.editing.running_edit import RunningEdit
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.stride import visit
from fisedit_compile.errors import BaseMismatchError, FiseditError, MaskError
from fisedit_compile.ir.call import Call
from fisedit_compile.runtime.control import Control
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.weak_method import weakly


class NothingLeftError(FiseditError):
    """All edits of a run have failed; it is left behind the step at which the last one did."""


class EditRun(PipelineRun):
    """Makes edits: dense steps until their masks are known, then sparse ones, the first under Prompt-to-Prompt control.

    The samples of several edits are one batch, and its steps are those of each edit alone: where one is at a dense step
    and another at a sparse one, the batch is cut in two.

    Args:
        unet, pipe, tokenizers, callback: see :class:`~fisedit_compile.editing.pipeline_run.PipelineRun`.
        failures: of the edits.

    Attributes:
        staging: what brings calls of bases from host memory; None where all lie on the device.
        check_noise: called at the end of each step of several edits.
    """

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        callback: StepCallback | None,
        failures: Failures,
    ) -> None:
        super().__init__(unet, pipe, tokenizers, callback)
        self.edits: tuple[RunningEdit, ...] = ()
        self.plan_ms = 0.0
        self.staging: Staging | None = None
        self.check_noise: Callable[[], None] = lambda: None
        self._failures = failures
        self._spans: dict[RunningEdit, tuple[int, int]] = {}
        self._prepared: dict[Any, Prepared] = {}  # a callback may take a part of the batch away in the loop
        self._controls: dict[Any, Control] = {}
        self._rows: dict[Any, Tensor] = {}
        self._joined: dict[Any, JoinedCalls] = {}

    def make(self, edits: Sequence[RunningEdit]) -> None:
        """Say which edits the run makes, before it begins; their bases have the same steps and kinds of calls."""
        self.edits = tuple(edits)
        bounds = accumulate((edit.samples for edit in edits), initial=0)
        self._spans = dict(zip(edits, pairwise(bounds), strict=True))
        base = self._base
        if not base.visits_all:
            visit(self.pipe.scheduler, base.num_inference_steps, base.visits, weakly(self._check_schedule))

    @property
    def samples(self) -> int:
        """Pictures of all edits."""
        return sum(edit.samples for edit in self.edits)

    def begin(self, call: Call) -> None:
        if self._base.visits_all:
            self._check_schedule()
        for edit in self.edits:
            edit.begin(self.pipe.scheduler)
            then, now = edit.base.latents.device, call.tensors[0].device
            if then != now:
                raise BaseMismatchError(f"the base lies on {then}, the U-Net runs on {now}: move the pipeline back")
            if isinstance(edit, DenseEdit):
                edit.lowered = self.unet.program(call).lowered

    def _check_schedule(self) -> None:
        self._base.check_schedule(Schedule.of(self.pipe.scheduler))

    def predict(self, call: Call) -> Tensor:
        for edit in self.edits:
            self._recorded_call(edit, call)
        first, *others = groups = self._groups()
        if not others and len(first) == len(self.edits):
            return self._predict(call, first)
        parts = call.signature.sample_shape[0] // self.samples
        out: Tensor | None = None
        for group in groups:
            key = parts, *group
            if key not in self._rows:
                spans = [self._spans[edit] for edit in group]
                self._rows[key] = rows_of(spans, self.samples, parts, call.tensors[0].device)
            rows = self._rows[key]
            predicted = self._predict(call_of_rows(self.unet, call, rows), group)
            if out is None:
                out = predicted.new_zeros(call.signature.sample_shape[0], *predicted.shape[1:])
            out.index_copy_(0, rows, predicted)
        assert out is not None
        return out

    def finish_step(self, latents: Tensor) -> Tensor:
        if len(self.edits) == 1:
            return self._finish_edit(self.edits[0], latents, self.latents)
        self.check_noise()
        pieces = [
            self._finish_edit(edit, latents[slice(*span)], [each[slice(*span)] for each in self.latents])
            for edit, span in self._spans.items()
        ]
        return torch.cat(pieces)

    def decode(self, latents: Tensor) -> Tensor | None:
        pieces: list[Tensor | None] = []
        for edit, span in self._spans.items():
            if not edit.failed and edit.ran_dense:
                edit.decoding = Decoding("as its steps")
            pieces.append(None if edit.failed else edit.decoding(latents[slice(*span)], edit.host_mask))
        known = next((piece for piece in pieces if piece is not None), None)
        if known is None or len(pieces) == 1:
            return known
        for i, (edit, span) in enumerate(self._spans.items()):
            if edit.failed:  # nobody sees it
                pieces[i] = known.new_zeros(edit.samples, *known.shape[1:])
            elif pieces[i] is None:
                pieces[i] = self.pipe.vae.vae.decode(latents[slice(*span)], return_dict=False)[0]
        return torch.cat([piece for piece in pieces if piece is not None])

    @property
    def expected_steps(self) -> int:
        return len(self._base.visits)

    def finish(self) -> None:
        if len(self.latents) != self.expected_steps:
            raise BaseMismatchError(
                f"the pipeline made {len(self.latents)} steps, and an edit of this base makes {self.expected_steps}"
            )

    def span(self, edit: RunningEdit) -> tuple[int, int]:
        """The first sample of an edit, and the one behind its last."""
        return self._spans[edit]

    def latents_of(self, edit: RunningEdit) -> tuple[Tensor, ...]:
        """The latents of an edit's samples after each step, in memory of their own."""
        if len(self.edits) == 1:
            return tuple(self.latents)
        return tuple(latents[slice(*self._spans[edit])].clone() for latents in self.latents)

    @property
    def _base(self) -> Any:
        """The first base: schedule and steps are those of all."""
        return self.edits[0].base

    def _groups(self) -> list[list[RunningEdit]]:
        """Edits whose samples are one batch in this step, in their order.

        Where not all of them can be, their numbers are powers of two: a U-Net is captured for each size of its batch,
        which takes longer than many edits.
        """
        kinds: dict[Any, list[RunningEdit]] = {}
        for edit in self.edits:
            dense = self.step < edit.dense_steps
            # Alone one of a large mask runs dense (``dense_above``), and beside others, too.
            large = not dense and len(self.edits) > 1 and edit.is_large
            kinds.setdefault((dense, large), []).append(edit)
        groups = [*kinds.values()] if len(kinds) == 1 else [each for kind in kinds.values() for each in _split(kind)]
        return [group for group in groups if not all(edit.failed for edit in group)]

    def _predict(self, call: Call, edits: Sequence[RunningEdit]) -> Tensor:
        """The noise prediction of a call of some of the edits."""
        device, control = call.tensors[0].device, self._control(call, edits)
        if self.step < edits[0].dense_steps:
            cache = self._cache(call, edits, maps_alone=True) if control else None
            return self.timer.time("dense", device, lambda: self._dense(call, cache, control))
        prepared = self._prepare(call, edits)
        for edit in edits:
            edit.note_step(prepared, edit.samples / sum(each.samples for each in edits))
        if prepared.dense:  # edits put the bases' latents outside their masks themselves
            self.unet.check_plan(call, prepared)
            maps = self._cache(call, edits, maps_alone=True) if control else None
            return self.timer.time("sparse", device, lambda: self._dense(call, maps, control))
        cache = self._cache(call, edits)
        return self.timer.time("sparse", device, lambda: self.unet.step(call, cache, prepared, control))

    def _dense(self, call: Call, cache: Recorded | None, control: Control | None) -> Tensor:
        if control is None:
            return self.unet.dense(call)
        assert cache is not None
        return self.unet.controlled(call, cache, control)

    def _control(self, call: Call, edits: Sequence[RunningEdit]) -> Control | None:
        """What the words keep of the bases' in this step; None where no sample keeps anything any more."""
        under = tuple(edit.under_control(self.step) for edit in edits)
        if not any(map(any, under)):
            return None
        part = self.parts(call)[1]  # a callback may take guidance away in the loop
        key = part, *edits, *under
        if key not in self._controls:
            words = zip(*(edit.words(samples) for edit, samples in zip(edits, under, strict=True)), strict=True)
            mapper, keep, weight = (each[0] if len(each) == 1 else torch.cat(each) for each in words)
            self._controls[key] = Control(mapper, keep, part, weight)
        return self._controls[key]

    def _cache(self, call: Call, edits: Sequence[RunningEdit], *, maps_alone: bool = False) -> Recorded:
        """What the bases keep of the call that this one repeats, where the U-Net runs; waits until it is in memory."""
        sources = [edit.base.calls[self.calls_made].cache for edit in edits]
        # One that is on its way from the disk is brought later.
        later = [each.cache for each in edits[0].base.calls[self.calls_made + 1 :][:1] if each.is_in]
        following: list[Recorded | None] = [*sources[1:], *later, None]

        def bring(i: int) -> Recorded:
            return sources[i] if self.staging is None else self.staging.bring(sources[i], following[i])

        if len(edits) == 1:
            return bring(0)
        key = call.signature, *edits
        if key not in self._joined:
            specs, parts = (
                self.unet.program(call).lowered.kept.stored_specs,
                len(call.tensors[0]) // self.parts(call)[0],
            )
            self._joined[key] = JoinedCalls(call.signature, specs, parts, call.tensors[0].device)
        return self._joined[key].fill(sources, bring, maps_alone=maps_alone)

    def _recorded_call(self, edit: RunningEdit, call: Call) -> RecordedCall:
        """The base's call that this one repeats.

        Raises:
            BaseMismatchError: the pipeline's loop runs otherwise than for the base.
        """
        calls = edit.base.calls
        if self.calls_made >= len(calls):
            raise BaseMismatchError("the pipeline calls its U-Net more often than for the base: use the same arguments")
        recorded = calls[self.calls_made]
        then, now = recorded.cache.signature.sample_shape, call.signature.sample_shape
        if (then[0] * self.samples, *then[1:]) != (now[0] * edit.samples, *now[1:]):
            who = [f"the edit has the callback {self.callback.name}"] if self.callback else []
            who += [f"the base had {edit.base.callback}"] if edit.base.callback else []
            raise BaseMismatchError(
                f"at step {self.step} the U-Net is called with latents {list(now)}, and was with {list(then)} for the "
                f"base: give both the same callback_on_step_end ({'; '.join(who) or 'neither has one that changed it'})"
            )
        if len(self.edits) > 1:
            check_call(call.signature, recorded.cache.signature, edit.asked.index)
        return recorded

    def _prepare(self, call: Call, edits: Sequence[RunningEdit]) -> Prepared:
        key = call.signature, *edits
        if key not in self._prepared:
            start = time.perf_counter()
            regions = [edit.region for edit in edits]
            self._prepared[key] = self.unet.prepare(call, regions[0] if len(regions) == 1 else torch.cat(regions))
            self.plan_ms += (time.perf_counter() - start) * 1e3
        return self._prepared[key]

    def _finish_edit(self, edit: RunningEdit, latents: Tensor, before: list[Tensor]) -> Tensor:
        try:
            return edit.finish_step(self.step, latents, before)
        except MaskError as error:
            with self._failures.of(edit.asked.index):
                raise error
        edit.give_up()
        if all(each.failed for each in self.edits):
            raise NothingLeftError("all edits have failed")
        return edit.finish_step(self.step, latents, before)


def _split(edits: Sequence[RunningEdit]) -> list[list[RunningEdit]]:
    """Edits in as few groups as there can be whose numbers are powers of two, the largest first."""
    groups, start = [], 0
    while count := len(edits) - start:
        end = start + (1 << count.bit_length() - 1)
        groups.append(list(edits[start:end]))
        start = end
    return groups
