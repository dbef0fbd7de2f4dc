"""Many copies and gathers of rows at once: they bring the base's tensors to the buffers that a CUDA graph reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.kernels.indexing.packed_rows import unpack_rows_reference
from fisedit_compile.kernels.indexing.row_format import RowFormat


class RowCopies:
    """Fills the same targets again and again, each time from other sources; on a GPU by one launch, or two.

    Args:
        targets: contiguous ``[H, *C]`` each, all on one device; written by :meth:`run`.
        indices: for each target the rows of its source that it takes, int64 ``[H]``; None takes all, in order.
        counts: int32 ``[len(targets)]`` on the device: how many rows are real, of each target that has an index. Each
            run reads it anew, and leaves the rows behind as they are.
        formats: for each target how its source is packed; None, for one target or for all, is as the target lies.

    Raises:
        ValueError: a target is not contiguous, or there are not as many targets as indices, counts and formats.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        indices: Sequence[Tensor | None],
        counts: Tensor,
        formats: Sequence[RowFormat | None] | None = None,
    ) -> None:
        self.formats = [None] * len(targets) if formats is None else list(formats)
        if not len(targets) == len(indices) == len(counts) == len(self.formats):
            raise ValueError(
                f"{len(targets)} targets, {len(indices)} indices, {len(counts)} counts, {len(self.formats)} formats; "
                "give as many of each"
            )
        if any(not target.is_contiguous() for target in targets):
            raise ValueError("a target is not contiguous; give buffers of their own")
        self.targets, self.indices, self.counts = list(targets), list(indices), counts
        self._sources: list[Tensor] = []
        self._launch = None
        if counts.is_cuda:
            from fisedit_compile.kernels.indexing.copy_rows_triton import CopyLaunch
            from fisedit_compile.kernels.indexing.unpack_rows_triton import UnpackLaunch

            self._launch = CopyLaunch(self.targets, self.indices, counts, self.formats)
            self._unpack = UnpackLaunch(self.targets, self.indices, counts, self.formats)

    def addresses(self, sources: Sequence[Tensor]) -> Sequence[Tensor] | Tensor:
        """The sources in the form that :meth:`run` takes, to be made once for sources that are used again.

        The sources have to stay alive as long as it is used: on a GPU it is a tensor of their addresses.

        Args:
            sources: one for each target, contiguous, of the target's dtype and channels, or the bytes of such rows in
                its format. Where the target has no index, as many rows as the target.

        Raises:
            ValueError: a source of another shape, dtype or device.
        """
        if len(sources) != len(self.targets):
            raise ValueError(f"{len(sources)} sources for {len(self.targets)} targets; give one for each")
        for source, target, index, form in zip(sources, self.targets, self.indices, self.formats, strict=True):
            row, dtype = (target.shape[1:], target.dtype) if form is None else ((form.nbytes,), torch.uint8)
            fits = source.shape[1:] == row and (index is not None or source.shape[:1] == target.shape[:1])
            if not fits or source.dtype != dtype or source.device != target.device or not source.is_contiguous():
                raise ValueError(
                    f"a source {list(source.shape)} {source.dtype} on {source.device} for a target "
                    f"{list(target.shape)} {target.dtype} on {target.device}; give a contiguous one that fits"
                )
        return list(sources) if self._launch is None else self._launch.addresses(sources)

    def run(self, sources: Sequence[Tensor] | Tensor) -> None:
        """Copy, on the current stream; ``sources`` is a result of :meth:`addresses`."""
        if self._launch is not None:
            assert isinstance(sources, Tensor)
            self._launch.run(sources)
            self._unpack.run(sources)
            return
        rows = zip(sources, self.targets, self.indices, self.counts.tolist(), self.formats, strict=True)
        for source, target, index, count, form in rows:
            if form is not None:
                taken = source if index is None else source.index_select(0, index[:count])
                target[: len(taken)] = unpack_rows_reference(taken, form)
            elif index is None:
                target.copy_(source)
            else:
                torch.index_select(source, 0, index[:count], out=target[:count])
