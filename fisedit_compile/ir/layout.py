"""The spatial layout of an FX value: what each of its dimensions means.

A feature map travels through a U-Net as ``[B, C, H, W]``, as tokens ``[B, H*W, C]`` and as heads
``[B, heads, H*W, C/heads]``. A layout names the role of each dimension, so that a pass can turn any of them into the
same *rows* ``[M, *channels]``, one row for each active pixel, and can tell a view that only regroups channels (free on
rows) from one that mixes pixels with channels (no meaning on rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

#: (height, width) of a feature map or a picture, in its own pixels.
Size = tuple[int, int]


def size_text(size: Size) -> str:
    """``(96, 64)`` -> ``96x64``, for messages and reports."""
    return f"{size[0]}x{size[1]}"


#: What a dimension may be: b batch, c channels (there may be several such), h height, w width, s height and width
#: merged into one dimension of tokens.
ROLES = "bchws"


@dataclass(frozen=True)
class Layout:
    """The roles of a value's dimensions, one letter of :data:`ROLES` for each, and the resolution of its pixels.

    ``Layout("bchw", (64, 64))`` is a feature map, ``Layout("bsc", (64, 64))`` its tokens.
    """

    roles: str
    size: Size

    def __post_init__(self) -> None:
        spatial = [role for role in self.roles if role in "hws"]
        if spatial not in (["h", "w"], ["s"]) or self.roles.count("b") != 1 or set(self.roles) - set(ROLES):
            raise ValueError(f"{self.roles!r} is not a layout: one b, then h and w in order or one s, any number of c")

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings batch and space to the front and leaves the channels in their order."""
        pixel = [i for role in "bhws" for i, r in enumerate(self.roles) if r == role]
        return (*pixel, *(i for i, role in enumerate(self.roles) if role == "c"))

    @property
    def pixel_dims(self) -> int:
        """How many leading dimensions of the permuted value are batch and space."""
        return len(self.roles) - self.roles.count("c")

    def channels(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the channel dimensions of a value of ``shape``."""
        return tuple(shape[i] for i, role in enumerate(self.roles) if role == "c")

    def pixel_major(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``(B*H*W, *channels)``: the shape of a value of ``shape`` with one row a pixel, every pixel among them."""
        return (math.prod(shape[dim] for dim in self.order[: self.pixel_dims]), *self.channels(shape))

    def row_dim(self, dim: int) -> int:
        """The dimension of the rows that holds channel dimension ``dim`` of the dense value."""
        dim %= len(self.roles)
        if self.roles[dim] != "c":
            raise ValueError(f"dimension {dim} of a {self.roles!r} value is no channel dimension")
        return 1 + self.roles[:dim].count("c")

    def permuted(self, dims: Sequence[int]) -> Layout:
        """The layout after ``permute(dims)``. Raises ValueError where width would come before height."""
        return Layout("".join(self.roles[dim] for dim in dims), self.size)

    def viewed(self, old: Sequence[int], new: Sequence[int]) -> Layout:
        """The layout after a view from shape ``old`` to shape ``new``.

        Neighbouring dimensions of one kind may be split and merged; batch, space and channels may not mix.

        Raises:
            ValueError: the view mixes kinds, or splits space into something other than height and width.
        """
        kinds = ["s" if role in "hws" else role for role in self.roles]
        groups = [(kind, list(members)) for kind, members in groupby(range(len(old)), key=lambda i: kinds[i])]
        roles, dims = "", list(new)
        for kind, members in groups:
            total = math.prod(old[i] for i in members)
            taken: list[int] = []
            while dims and (math.prod(taken) < total or not taken):
                taken.append(dims.pop(0))
            if math.prod(taken) != total:
                raise ValueError(f"the view {tuple(old)} -> {tuple(new)} mixes {kind!r} with its neighbours")
            if kind == "s":
                if tuple(taken) not in ((total,), self.size):
                    raise ValueError(f"the view {tuple(old)} -> {tuple(new)} splits space into {tuple(taken)}")
                roles += "s" if len(taken) == 1 else "hw"
            elif kind == "b" and len(taken) != 1:
                raise ValueError(f"the view {tuple(old)} -> {tuple(new)} splits the batch")
            else:
                roles += kind * len(taken)
        if dims:
            raise ValueError(f"the view {tuple(old)} -> {tuple(new)} leaves {tuple(dims)} without a role")
        return Layout(roles, self.size)


def inverse_permutation(order: Sequence[int]) -> list[int]:
    """The dimensions that undo ``permute(order)``."""
    return sorted(range(len(order)), key=lambda dim: order[dim])
