"""The result of an edit, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisedit_compile.editing.prompt_alignment import changed_words
from fisedit_compile.editing.rounds import Trajectory
from fisedit_compile.editing.step_macs import StepMacs

if TYPE_CHECKING:
    from fisedit_compile.editing.edit_run import EditRun
    from fisedit_compile.editing.running_edit import RunningEdit


@dataclass(frozen=True)
class EditReport:
    """How an edit was made and what it saved: numbers and words, which keep no cache alive and pickle.

    Attributes:
        mask_area: share of the latents that was edited, of all samples. Steps compute a cell around a mask, too; one
            that is found has this cell until the last step, behind which it is cut down to what has changed.
        mask_source: ``"found"``, ``"given"``, or ``"found and given"`` / ``"found or given"``; ``"none"`` for a dense
            edit without one, which recomputes the whole picture.
        removed_words, added_words: what changed in the prompt of each sample.
        dense_steps, sparse_steps: denoising steps of either kind.
        unet_ms: median wall time of a dense (controlled) and a sparse U-Net call, and their ratio.
        plan_ms: from the mask to the first sparse step.
        seconds: wall time of the whole edit.
        ran_dense: whether all steps ran dense: because the mask was larger than ``dense_above``, or as asked for.
        background_identical: whether the final latents outside the mask have the base's bits.
        background: ``"pixels"``: away from the mask the pictures are the base's, bit for bit; ``"latents"``: they are
            as the pipeline decoded them.
        uncomposed: samples whose picture is as the pipeline returned it although ``background`` is ``"pixels"``: the
            safety checker blackened it, or the base's.
        decoder: ``"sparse"``: the VAE's decoder computed what the edit changed, and around it; ``"dense (why)"``: the
            whole picture; ``"none"``: nothing was decoded.
        made_together: edits that one run made, this one among them (:meth:`~fisedit_compile.Editor.edit_many`):
            ``unet_ms``, ``plan_ms`` and ``seconds`` are of all of them together.
    """

    mask_area: float
    mask_source: str
    removed_words: tuple[tuple[str, ...], ...]
    added_words: tuple[tuple[str, ...], ...]
    dense_steps: int
    sparse_steps: int
    unet_ms: dict[str, float | None]
    plan_ms: float
    seconds: float
    ran_dense: bool
    background_identical: bool
    background: str
    uncomposed: tuple[int, ...]
    decoder: str
    made_together: int
    step_macs: StepMacs = field(repr=False, compare=False)

    @classmethod
    def of(
        cls,
        run: EditRun,
        edit: RunningEdit,
        latents: Tensor,
        *,
        seconds: float,
        background: str,
        uncomposed: tuple[int, ...],
    ) -> EditReport:
        """Of one edit of a run that has ended; ``latents`` are its final ones."""
        base, prompts = edit.base, edit.asked.prompts
        outside_same = (latents == base.latents) | edit.mask[:, None]
        times = run.timer.milliseconds()
        words = [changed_words(old, new) for old, new in zip(base.prompts, prompts, strict=True)]
        return cls(
            mask_area=float(edit.final_mask.float().mean()),
            mask_source=edit.asked.mask_source,
            removed_words=tuple(tuple(removed) for removed, _ in words),
            added_words=tuple(tuple(added) for _, added in words),
            dense_steps=edit.steps[0],
            sparse_steps=edit.steps[1],
            unet_ms=summarise_times(times["dense"], times["sparse"]),
            plan_ms=run.plan_ms,
            seconds=seconds,
            ran_dense=edit.ran_dense,
            background_identical=bool(outside_same.all()),
            background=background,
            uncomposed=uncomposed,
            decoder=edit.decoding.how,
            made_together=len(run.edits),
            step_macs=edit.step_macs(),
        )

    @property
    def macs(self) -> dict[str, float]:
        """Multiply-accumulates of one dense and one sparse U-Net call, and their ratio; counted on first use.

        Raises:
            FiseditError: the report was pickled or copied before they were counted.
        """
        return self.step_macs.count()

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dump`` takes, with the multiply-accumulates."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "step_macs"}
        return {**values, "macs": self.macs}

    def __str__(self) -> str:
        """One line; with the multiply-accumulates if they were counted before."""
        speedup = self.unet_ms["speedup"]
        counted = self.step_macs.counted
        savings = [f"1/{counted['ratio']:.1f} of the MACs"] if counted else []
        savings += [f"1/{speedup:.1f} of the time"] if speedup else []
        return (
            f"mask {self.mask_area:.1%} of the picture ({self.mask_source}), "
            f"{self.dense_steps} dense and {self.sparse_steps} sparse steps"
            + (f"; a sparse step takes {' and '.join(savings)}" if savings else "")
            + (" (the mask is so large that they ran the dense U-Net)" if self.ran_dense and self.sparse_steps else "")
            + f"; {self.seconds:.1f} s"
            + (f" for {self.made_together} edits" if self.made_together > 1 else "")
            + "; background "
            + (f"identical in {self.background}" if self.background_identical else "CHANGED")
            + (f" (not in sample(s) {', '.join(map(str, self.uncomposed))}: blackened)" if self.uncomposed else "")
            + f"; decoder {self.decoder}"
        )


@dataclass(frozen=True, eq=False)
class Edit:
    """An edited picture. Made by :meth:`fisedit_compile.Editor.edit`.

    Attributes:
        images: one picture a sample, of the kind that the pipeline returns; ``report.background`` says what is the
            base's in them.
        nsfw: of each picture, whether the safety checker blackened it; None without a checker.
        mask: what was edited, bool ``[n, h, w]`` at latent resolution.
        latents: the final latents ``[n, c, h, w]``; outside the mask they are the base's, bit for bit.
        report: how it was made.
        trajectory: what it went through, from which :meth:`~fisedit_compile.Editor.edit` records it to edit it again.
    """

    images: Any
    nsfw: tuple[bool, ...] | None
    mask: Tensor
    latents: Tensor
    report: EditReport
    trajectory: Trajectory = field(repr=False)

    @property
    def image(self) -> Any:
        """The picture of the first sample."""
        return self.images[0]


def summarise_times(dense_ms: list[float], sparse_ms: list[float]) -> dict[str, float | None]:
    """Medians of both kinds of U-Net calls; None for a kind that did not run."""
    dense, sparse = (median(times) if times else None for times in (dense_ms, sparse_ms))
    return {"dense_step": dense, "sparse_step": sparse, "speedup": dense / sparse if dense and sparse else None}
