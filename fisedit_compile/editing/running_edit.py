"""One edit while a pipeline makes it, alone or beside others: its words, its mask, and the latents of its samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisedit_compile.config import WordChange
from fisedit_compile.editing.decoding import Decoding
from fisedit_compile.editing.edit_checks import edited_samples
from fisedit_compile.editing.edit_request import CheckedEdit
from fisedit_compile.editing.prompt_alignment import align_prompts, changed_words, removed_tokens
from fisedit_compile.editing.step_macs import StepMacs
from fisedit_compile.editing.stride import StrideError
from fisedit_compile.editing.word_weights import token_weights
from fisedit_compile.errors import LargeMaskError, MaskError
from fisedit_compile.masks.changed_part import changed_part
from fisedit_compile.masks.difference_mask import change_strength, difference_mask
from fisedit_compile.masks.grown import grown
from fisedit_compile.masks.old_words import attention_to, with_hidden_changes, with_old_words, words_of_changes
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.utils.single_thread import single_thread

#: Cells around the mask that sparse steps compute with it: convolutions at the mask's rim then read what the new words
#: make of their neighbours. Around a mask that is given they are the base's all the same behind each step, around one
#: that is found they may change, for what it misses of old things (docs/decisions.md, 2026-11-29).
RIM = 1

#: t1 and t2 of the difference formula: the steps whose latents are compared (paper 3.1: within [1, 10]).
DIFFERENCE_STEPS = (1, 10)


class RunningEdit:
    """What an edit does at each step with the latents of its own samples, whoever else is in the batch.

    Its first steps are dense, until its mask is known: k of them where that is to be found, none where it is given and
    not joined with one to be found, all of them for an edit that is to be dense
    (:class:`~fisedit_compile.editing.dense_edit.DenseEdit`).

    Args:
        pipe: the pipeline that runs.
        asked: what is to be made.

    Attributes:
        decoding: what its final latents are decoded by.
        failed: it has no mask: its latents are the base's, and nobody is to see them.
        dense_steps: how many steps are dense.

    Raises:
        MaskError: the words of a sample change nothing that its text encoder sees.
        ValueError: words that cannot be aligned or weighed.
    """

    mask: Tensor  # bool [n, h, w]; found behind the dense steps, and cut down to what has changed behind the last one
    host_mask: Tensor  # as it was until the last step, on the host, so that nobody has to wait for it
    region: Tensor  # what sparse steps compute, on the host

    def __init__(self, pipe: Any, asked: CheckedEdit) -> None:
        base, prompts = asked.base, asked.prompts
        self.asked, self.base, self.samples = asked, base, asked.samples
        self.decoding = Decoding("the pipeline's own")
        self.failed = False
        self.dense_steps = base.dense_steps
        self._knows_mask = False
        self._stride_error: StrideError | None = None
        self._first_stepped: Prepared | None = None  # of the first step behind the mask
        self._share = 1.0
        device = base.latents.device
        edited = edited_samples(base, prompts, asked.changes, asked.weights)
        mapper, keep = align_prompts(
            pipe,
            base.prompts,
            prompts,
            arguments=base.arguments,
            changes=asked.changes,
            weighted=[bool(each) for each in asked.weights],
            device=device,
        )
        # Of tokens whose maps the base does not keep: beside a base that keeps more of them theirs are empty.
        mapper[:, _kept_tokens(asked, mapper.shape[1]) :] = 0
        weight = token_weights(pipe, prompts, asked.weights, arguments=asked.arguments, device=device)
        copies = asked.copies
        self._words = tuple(each.repeat_interleave(copies, 0) for each in (mapper, keep, weight))
        # Of each sample, how many steps are controlled.
        self._controlled = [
            base.config.count_controlled_steps(len(base.visits), _word_change(*pair))
            if asked.controlled is None
            else asked.controlled
            for pair in zip(base.prompts, prompts, strict=True)
            for _ in range(copies)
        ]
        self._edited = torch.tensor(edited).repeat_interleave(copies)  # bool [n], on the host: the others stay
        # The positions of those that change: a bool index would wait for the device at each use.
        positions = [copies * i + copy for i, each in enumerate(edited) if each for copy in range(copies)]
        self._edited_samples = torch.tensor(positions, device=device)
        if asked.given is not None and asked.combine == "replace":
            self._know_mask(self._of_edited(asked.given))
            self.dense_steps = 0
            return
        changes = removed_tokens(pipe, base.prompts, prompts, base.arguments)
        self._changes = [each for each, changed in zip(changes, edited, strict=True) if changed for _ in range(copies)]

    def begin(self, scheduler: Any) -> None:
        """Called before the first step, with the scheduler of the run, its timesteps set."""
        if self.base.solver_steps:
            self._stride_error = StrideError(scheduler)

    def under_control(self, step: int) -> tuple[bool, ...]:
        """Of each sample, whether it keeps attention maps of the base in a step."""
        return tuple(step < steps for steps in self._controlled)

    def words(self, under: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """``mapper``, ``keep`` and ``weight`` of a :class:`~fisedit_compile.runtime.control.Control`.

        Args:
            under: of :meth:`under_control`; the other samples keep nothing.
        """
        mapper, keep, weight = self._words
        still = torch.tensor(under).to(keep.device)[:, None]
        return mapper * still[:, None], keep * still, torch.where(still, weight, 1)

    def finish_step(self, step: int, latents: Tensor, before: list[Tensor]) -> Tensor:
        """The latents ``[n, c, h, w]`` that the next step starts from.

        Args:
            step: that ends.
            latents: to which the scheduler leads.
            before: after each earlier step.

        Raises:
            MaskError: no mask can be found, or one that is too large.
        """
        after = self.base.latents_after(step)
        if self.failed:
            return after
        if step < self.base.dense_steps and self._stride_error is not None:
            latents = (latents + self._stride_error.of(self.base.solver_steps[step], after)).to(latents.dtype)
        if not self._knows_mask:
            if step < self.dense_steps - 1:
                return latents
            self._know_mask(self._found_mask(step, [*before, latents]))
        if step == len(self.base.visits) - 1 and self._is_found_alone:
            self.mask = changed_part(self.mask, after, latents)
        # Outside the mask the picture is the base's, bit for bit, whatever the scheduler remembers of other steps.
        return torch.where(self.mask[:, None], latents, after)

    def give_up(self) -> None:
        """Go on as the base: no mask was found."""
        self.failed = True
        self._know_mask(torch.zeros(self.samples, *self.base.latents.shape[2:], dtype=torch.bool))

    def note_step(self, prepared: Prepared, share: float) -> None:
        """Remember what the first step behind the mask was prepared by, and the edit's share of its samples."""
        if self._first_stepped is None:
            self._first_stepped, self._share = prepared, share

    @property
    def final_mask(self) -> Tensor:
        """The mask behind the last step, on the host; waits for it."""
        return self.mask.cpu() if self._is_found_alone else self.host_mask

    @property
    def is_large(self) -> bool:
        """Whether so much is to be computed that sparse steps of this edit alone run dense."""
        return float(self.region.float().mean()) > self.base.config.dense_above

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps are dense, and how many come behind the mask."""
        return self.dense_steps, len(self.base.visits) - self.dense_steps

    @property
    def ran_dense(self) -> bool:
        """Whether the steps behind the mask ran dense, because it is so large."""
        assert self._first_stepped is not None
        return self._first_stepped.dense

    def step_macs(self) -> StepMacs:
        """What counts the multiply-accumulates of the edit's steps."""
        assert self._first_stepped is not None
        return StepMacs(self._first_stepped.lowered, self.region, dense=self.ran_dense, share=self._share)

    @property
    def _is_found_alone(self) -> bool:
        """Whether the edit itself says where it changes the picture, and the user does not."""
        return self.asked.given is None

    def _know_mask(self, mask: Tensor) -> None:
        """The mask is known, as it was given or found: bool ``[n, h, w]``, on the host."""
        self.region = grown(mask, RIM)
        self.host_mask = self.region if self._is_found_alone else mask
        self.mask = self.host_mask.to(self.base.latents.device, non_blocking=True)
        self._knows_mask = True

    def _found_mask(self, step: int, latents: list[Tensor]) -> Tensor:
        """The mask of what the dense steps up to this one changed, joined with the one given; on the host."""
        with single_thread():  # of a CPU: some two hundred operations on as many cells as the latents have
            mask = self._find_mask(step, latents)
        if (area := float(mask.float().mean())) > (largest := self.asked.largest_mask):
            raise LargeMaskError(
                f"the mask that was found covers {area:.0%} of the picture, and largest_mask is "
                f"{largest:.0%}: generate a picture of the new words, give a mask, or allow more"
            )
        return mask

    def _find_mask(self, step: int, latents: list[Tensor]) -> Tensor:
        first, last = DIFFERENCE_STEPS[0] - 1, min(DIFFERENCE_STEPS[1], len(latents))
        after = [self.base.latents_after(visit) for visit in range(last)]
        edited = self._edited_samples
        base, edit = (torch.stack(each[first:last])[:, edited] for each in (after, latents))
        found = torch.zeros(latents[0][:, 0].shape, dtype=torch.bool)
        changed = difference_mask(base, edit)
        if any(map(any, self._changes)):
            attention = self._attention_to_removed(step, changed)
            changed = with_old_words(changed, attention)
            if any(several := [len(each) > 1 for each in self._changes]):
                of_several = torch.tensor(several).to(changed.device, non_blocking=True)
                changed = with_hidden_changes(changed, attention, of_several, change_strength(base, edit))
        found[self._edited] = changed.cpu()
        given, combine = self.asked.given, self.asked.combine
        if given is None:
            return found
        mask = self._of_edited(found & given if combine == "and" else found | given)
        if not mask[self._edited].flatten(1).any(dim=1).all():
            raise MaskError("the mask that was found and the one given do not meet: give a larger one, or combine='or'")
        return mask

    def _attention_to_removed(self, step: int, like: Tensor) -> Tensor:
        """How strongly the base attends to the words that each change takes away.

        ``[edited samples, changes, h, w]`` on the device of ``like``, which is ``[edited samples, h, w]``.
        """
        made = [call for call in self.base.calls if call.step <= self.base.visits[step]]
        of_calls = (
            [kept for entry, kept in call.cache.items() if entry.kind == "attention"] for call in reversed(made)
        )
        last: list[Tensor] = next(filter(None, of_calls), [])  # the base keeps none of steps that are not controlled
        maps = (tensor.to(like.device, non_blocking=True) for tensor in last)
        if len(self._edited_samples) < self.samples:
            of_samples = (each.unflatten(0, (self.samples, -1)) for each in maps)
            maps = (each.index_select(0, self._edited_samples).flatten(0, 1) for each in of_samples)
        words = words_of_changes(self._changes, tokens=self._words[0].shape[1]).to(like.device, non_blocking=True)
        return attention_to(words, maps, (like.shape[1], like.shape[2]))

    def _of_edited(self, mask: Tensor) -> Tensor:
        """The mask, bool ``[n, h, w]``, of the samples that change: those whose prompts stay are the base's."""
        return mask & self._edited[:, None, None]


def _kept_tokens(asked: CheckedEdit, every: int) -> int:
    """Of how many tokens the base keeps attention maps, of ``every`` that there are."""
    kept = (tensor.shape[2] for entry, tensor in asked.base.calls[0].cache.items() if entry.kind == "attention")
    return next(kept, every)


def _word_change(old: str, new: str) -> WordChange:
    """What an edit does to the words of a prompt; one that stays, and whose words are weighted, counts as "removes"."""
    removed, added = changed_words(old, new)
    if not added:
        return "removes"
    return "replaces" if removed else "adds"
