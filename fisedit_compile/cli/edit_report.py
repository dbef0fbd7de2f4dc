"""``report.json`` of ``fisedit-compile edit``, and what is printed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisedit_compile.editing.plain_pipeline import DenseRegeneration
    from fisedit_compile.editing.result import Edit, EditReport


@dataclass(frozen=True)
class Made:
    """An edit of a run, and how it was made.

    Attributes:
        words: its prompt.
        of: what it changed: ``"base"``, or the name of an edit's file.
        report: of the edit; its seconds are without the capture of graphs.
        rebase_seconds: time to record the picture of the edit that it changed; None where it changed the base.
        dense_seconds: time of the dense regeneration it is compared with; None without.
        ssim: of both pictures; None without.
    """

    words: str
    of: str
    report: EditReport
    rebase_seconds: float | None = None
    dense_seconds: float | None = None
    ssim: float | None = None

    @classmethod
    def of_edit(
        cls,
        edit: Edit,
        *,
        of: str,
        capture_seconds: float,
        rebase_seconds: float | None,
        dense: DenseRegeneration | None,
    ) -> Made:
        """Of an edit whose time holds ``capture_seconds`` of capture, and its dense regeneration, if there is one."""
        words = edit.trajectory.prompts[0]
        report = replace(edit.report, seconds=edit.report.seconds - capture_seconds)
        if dense is None:
            return cls(words, of, report, rebase_seconds)

        from fisedit_compile.quality.ssim import ssim

        plain, sparse = median(dense.unet_ms), report.unet_ms["sparse_step"]
        times = {"dense_step": plain, "sparse_step": sparse, "speedup": plain / sparse if sparse else None}
        compared = replace(report, unet_ms=times)
        return cls(words, of, compared, rebase_seconds, dense.seconds, ssim(edit.image, dense.image))

    def values(self) -> dict[str, Any]:
        """For JSON."""
        values = self.report.to_dict()
        values["unet_ms"]["dense_of"] = "edit" if self.dense_seconds is None else "plain"
        seconds = {"edit": values.pop("seconds"), "edit_dense": self.dense_seconds}
        if self.rebase_seconds is not None:
            seconds["rebase"] = self.rebase_seconds
        values.update(edit=self.words, of=self.of, wall_seconds=seconds)
        if self.ssim is not None:
            values["ssim_vs_dense"] = self.ssim
        return values

    def __str__(self) -> str:
        lines = [str(self.report)]
        if self.dense_seconds is not None:
            lines.append(
                f"dense regeneration {self.dense_seconds:.1f} s: the edit is "
                f"{self.dense_seconds / self.report.seconds:.1f} times as fast; SSIM of the two {self.ssim:.3f}"
            )
        return "\n".join(lines)


def report_values(made: Sequence[Made], shared: dict[str, Any]) -> dict[str, Any]:
    """The values of ``report.json``: of one edit beside those of the run, of several in a list ``edits``."""
    if len(made) > 1:
        return {"edits": [each.values() for each in made], **shared}
    (values,) = (each.values() for each in made)
    return {**values, **shared, "wall_seconds": {**shared["wall_seconds"], **values["wall_seconds"]}}
