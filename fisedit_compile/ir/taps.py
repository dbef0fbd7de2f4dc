"""The geometry of a convolution that reads pixels through an index table."""

from __future__ import annotations

from dataclasses import dataclass

from fisedit_compile.ir.layout import Size, size_text


@dataclass(frozen=True)
class Taps:
    """Geometry of a convolution's neighbour table; every pair is (height, width).

    Attributes:
        source: size of the map that is stored; with ``upsampled``, the map before upsampling.
        target: size of the convolution's output.
        kernel, stride, padding, dilation: those of the convolution; it pads with zeros, the same on both sides.
        upsampled: the size to which the source is nearest-upsampled before the convolution; None if it is not. The
            table reads the small map itself, so the upsampled map is never made.
        dense: whether the source is a whole pixel-major map. The table then holds pixel ids of ``source``, and there
            is no halo.
        inside: whether the source has nothing but its rows. A tap that would read a pixel between the rows and the
            picture's edge then reads the nearest row on its way to the kernel's centre, and there is no halo.

    Raises:
        ValueError: a value out of range, ``target`` is not what this convolution gives for the source, or both
            ``dense`` and ``inside``.
    """

    source: Size
    target: Size
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    upsampled: Size | None = None
    dense: bool = False
    inside: bool = False

    def __post_init__(self) -> None:
        read = self.upsampled or self.source
        for name, size, least in (
            ("source", self.source, 1),
            ("target", self.target, 1),
            ("kernel", self.kernel, 1),
            ("stride", self.stride, 1),
            ("padding", self.padding, 0),
            ("dilation", self.dilation, 1),
            ("upsampled", read, 1),
        ):
            if len(size) != 2 or min(size) < least:
                raise ValueError(f"Taps.{name} is {size}; give (height, width), each at least {least}")
        output = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(read, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        if output != tuple(self.target):
            raise ValueError(
                f"Taps.target is {self.target}, but a {self.kernel} convolution over {read} with stride "
                f"{self.stride}, padding {self.padding}, dilation {self.dilation} gives {output}; "
                "give the convolution's output size"
            )

        if self.dense and self.inside:
            raise ValueError("Taps.dense and Taps.inside: a whole map has no pixel that is missing; give one of them")

    def __str__(self) -> str:
        upsampled = f" upsampled to {size_text(self.upsampled)}" if self.upsampled else ""
        names = ("kernel", "stride", "padding", "dilation")
        kind = "dense " if self.dense else "inside " if self.inside else ""
        return f"{kind}{size_text(self.source)}{upsampled} -> {size_text(self.target)}, " + ", ".join(
            f"{name} {size_text(getattr(self, name))}" for name in names
        )
