"""What happens at each U-Net call and at the end of each step while a pipeline makes an edit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.host_tier import Staging
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.editing.base import Base, RecordedCall
from fisedit_compile.editing.decoding import Decoding
from fisedit_compile.editing.edit_request import edited_samples
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.pipeline_run import PipelineRun
from fisedit_compile.editing.prompt_alignment import align_prompts, changed_words
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.step_macs import StepMacs
from fisedit_compile.editing.stride import StrideError, visit
from fisedit_compile.editing.word_weights import Weights, token_weights
from fisedit_compile.errors import BaseMismatchError, LargeMaskError, MaskError
from fisedit_compile.ir.call import Call, Signature
from fisedit_compile.masks.difference_mask import difference_mask
from fisedit_compile.runtime.control import Control
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.weak_method import weakly

#: t1 and t2 of the difference formula: the steps whose latents are compared (paper 3.1: within [1, 10]).
DIFFERENCE_STEPS = (1, 10)


class EditRun(PipelineRun):
    """Edits a base: k dense steps, the mask, then sparse steps; the first of them under Prompt-to-Prompt control.

    With a mask that is given, and not joined with one to be found, all steps are sparse.

    Attributes:
        staging: what brings the base's calls from host memory; None where they lie on the device.
    """

    mask: Tensor  # bool [n, h, w]; one that is to be found is known after the dense steps
    host_mask: Tensor  # the same on the host, so that nobody has to wait for it

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        callback: StepCallback | None,
        base: Base,
        prompts: tuple[str, ...],
        changes: Mapping[str, Any],
        weights: Sequence[Weights],
        given: Tensor | None,
        combine: str,
        largest_mask: float,
    ) -> None:
        super().__init__(unet, pipe, tokenizers, callback)
        self._base, self._given, self._combine, self._largest_mask = base, given, combine, largest_mask
        self._mask_is_known = False
        self._dense_steps = base.dense_steps
        self._prepared: dict[Signature, Prepared] = {}  # a callback may take a part of the batch away in the loop
        self._first_stepped: Prepared | None = None  # of the first step behind the mask
        self.plan_ms = 0.0
        self.staging: Staging | None = None
        device = base.latents.device
        edited = edited_samples(base, prompts, changes, weights)
        mapper, keep = align_prompts(
            self.pipe,
            base.prompts,
            prompts,
            arguments=base.arguments,
            changes=changes,
            weighted=[bool(each) for each in weights],
            device=device,
        )
        weight = token_weights(self.pipe, prompts, weights, arguments={**base.arguments, **changes}, device=device)
        copies = len(base.latents) // len(prompts)  # num_images_per_prompt: the pipeline repeats each prompt
        alignment = (each.repeat_interleave(copies, 0) for each in (mapper, keep, weight))
        self._alignment, self._controls = tuple(alignment), dict[tuple[int, ...], Control]()
        # Of each sample, how many steps are controlled.
        self._controlled = [
            base.config.count_controlled_steps(len(base.visits), adds=_only_adds(*pair))
            for pair in zip(base.prompts, prompts, strict=True)
            for _ in range(copies)
        ]
        self._edited = torch.tensor(edited).repeat_interleave(copies)  # bool [n], on the host: the others stay
        # The positions of those that change: a bool index would wait for the device at each use.
        positions = [copies * i + copy for i, each in enumerate(edited) if each for copy in range(copies)]
        self._edited_samples = torch.tensor(positions, device=device)
        if given is not None and combine == "replace":
            self._know_mask(self._of_edited(given))
            self._dense_steps = 0
        self._stride_error: StrideError | None = None
        if not base.visits_all:
            visit(self.pipe.scheduler, base.num_inference_steps, base.visits, weakly(self._check_schedule))

    def begin(self, call: Call) -> None:
        if self._base.visits_all:
            self._check_schedule()
        if self._base.solver_steps:
            self._stride_error = StrideError(self.pipe.scheduler)
        then, now = self._base.latents.device, call.tensors[0].device
        if then != now:
            raise BaseMismatchError(f"the base lies on {then}, the U-Net runs on {now}: move the pipeline back")

    def _check_schedule(self) -> None:
        self._base.check_schedule(Schedule.of(self.pipe.scheduler))

    def predict(self, call: Call) -> Tensor:
        cache = self._cache(call)
        device = call.tensors[0].device
        control = self._control(call)
        if self.step < self._dense_steps:
            return self.timer.time("dense", device, lambda: self._dense(call, cache, control))
        prepared = self._prepare(call)
        self._first_stepped = self._first_stepped or prepared
        return self.timer.time("sparse", device, lambda: self.unet.step(call, cache, prepared, control))

    def _dense(self, call: Call, cache: Recorded, control: Control | None) -> Tensor:
        return self.unet.dense(call) if control is None else self.unet.controlled(call, cache, control)

    def _control(self, call: Call) -> Control | None:
        """What the words keep of the base's in this step; None where no sample keeps anything any more."""
        under = tuple(self.step < steps for steps in self._controlled)
        if not any(under):
            return None
        part = self.parts(call)[1]  # a callback may take guidance away in the loop
        if (part, *under) not in self._controls:
            mapper, keep, weight = self._alignment
            still = torch.tensor(under).to(keep.device)[:, None]
            weight = torch.where(still, weight, 1)
            self._controls[part, *under] = Control(mapper * still[:, None], keep * still, part, weight)
        return self._controls[part, *under]

    def finish_step(self, latents: Tensor) -> Tensor:
        step, dense, after = self.step, self._dense_steps, self._base.latents_after(self.step)
        if step < self._base.dense_steps and self._stride_error is not None:
            latents = (latents + self._stride_error.of(self._base.solver_steps[step], after)).to(latents.dtype)
        if step == dense - 1:
            mask = self._find_mask([*self.latents, latents])
            if (area := float(mask.float().mean())) > self._largest_mask:
                raise LargeMaskError(
                    f"the mask that was found covers {area:.0%} of the picture, and largest_mask is "
                    f"{self._largest_mask:.0%}: generate a picture of the new words, give a mask, or allow more"
                )
            self._know_mask(mask)
        if step < dense - 1:
            return latents
        # Outside the mask the picture is the base's, bit for bit, whatever the scheduler remembers of other steps.
        return torch.where(self.mask[:, None], latents, after)

    def decode(self, latents: Tensor) -> Tensor | None:
        if self.ran_dense:
            self.decoding = Decoding("as its steps")
        return self.decoding(latents, self.host_mask)

    @property
    def expected_steps(self) -> int:
        return len(self._base.visits)

    def finish(self) -> None:
        if len(self.latents) != self.expected_steps:
            raise BaseMismatchError(
                f"the pipeline made {len(self.latents)} steps, and an edit of this base makes {self.expected_steps}"
            )

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps are dense, and how many come behind the mask."""
        return self._dense_steps, len(self._base.visits) - self._dense_steps

    @property
    def ran_dense(self) -> bool:
        """Whether the steps behind the mask ran dense, because it is so large."""
        assert self._first_stepped is not None
        return self._first_stepped.dense

    def step_macs(self) -> StepMacs:
        """What counts the multiply-accumulates of this edit's steps."""
        assert self._first_stepped is not None
        return StepMacs(self._first_stepped.lowered, self.host_mask, dense=self.ran_dense)

    def _cache(self, call: Call) -> Recorded:
        """What the base keeps of the call that this one repeats, where the U-Net runs; waits until it is in memory."""
        recorded, behind = self._recorded_call(call), self._base.calls[self.calls_made + 1 :]
        following = behind[0].cache if behind and behind[0].is_in else None  # one on its way from the disk comes later
        return recorded.cache if self.staging is None else self.staging.bring(recorded.cache, following)

    def _recorded_call(self, call: Call) -> RecordedCall:
        """The base's call that this one repeats.

        Raises:
            BaseMismatchError: the pipeline's loop runs otherwise than for the base.
        """
        calls = self._base.calls
        if self.calls_made >= len(calls):
            raise BaseMismatchError("the pipeline calls its U-Net more often than for the base: use the same arguments")
        recorded = calls[self.calls_made]
        then, now = recorded.cache.signature.sample_shape, call.signature.sample_shape
        if then != now:
            who = [f"the edit has the callback {self.callback.name}"] if self.callback else []
            who += [f"the base had {self._base.callback}"] if self._base.callback else []
            raise BaseMismatchError(
                f"at step {self.step} the U-Net is called with latents {list(now)}, and was with {list(then)} for the "
                f"base: give both the same callback_on_step_end ({'; '.join(who) or 'neither has one that changed it'})"
            )
        return recorded

    def _prepare(self, call: Call) -> Prepared:
        if call.signature not in self._prepared:
            start = time.perf_counter()
            self._prepared[call.signature] = self.unet.prepare(call, self.host_mask)
            self.plan_ms += (time.perf_counter() - start) * 1e3
        return self._prepared[call.signature]

    def _know_mask(self, mask: Tensor) -> None:
        """The mask is known: bool ``[n, h, w]``, on the host."""
        self.host_mask, self.mask = mask, mask.to(self._base.latents.device, non_blocking=True)
        self._mask_is_known = True

    def _find_mask(self, latents: list[Tensor]) -> Tensor:
        """The mask of what the dense steps changed, joined with the one given; on the host."""
        first, last = DIFFERENCE_STEPS[0] - 1, min(DIFFERENCE_STEPS[1], len(latents))
        after = [self._base.latents_after(visit) for visit in range(last)]
        edited = self._edited_samples
        base, edit = (torch.stack(each[first:last])[:, edited] for each in (after, latents))
        found = torch.zeros(latents[0][:, 0].shape, dtype=torch.bool)
        found[self._edited] = difference_mask(base, edit).cpu()
        if self._given is None:
            return found
        mask = self._of_edited(found & self._given if self._combine == "and" else found | self._given)
        if not mask[self._edited].flatten(1).any(dim=1).all():
            raise MaskError("the mask that was found and the one given do not meet: give a larger one, or combine='or'")
        return mask

    def _of_edited(self, mask: Tensor) -> Tensor:
        """The mask, bool ``[n, h, w]``, of the samples that change: those whose prompts stay are the base's."""
        return mask & self._edited[:, None, None]


def _only_adds(old: str, new: str) -> bool:
    """Whether a prompt has words that the old one has not, and all of those."""
    removed, added = changed_words(old, new)
    return bool(added) and not removed
