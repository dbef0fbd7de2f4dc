"""The calls that a method makes of its U-Net: logged and timed on the device, and counted on the meta device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fisedit_compile.macs.formulas  # noqa: F401  (teaches FlopCounterMode the operators that it lacks)


class CallKey(NamedTuple):
    """Identifies the work of a call: calls with the same key do the same.

    Attributes:
        sample: the shape of the latents, ``[batch, channels, height, width]``.
        text: the shape of the text's embeddings, ``[batch, tokens, width]``.
        grad: whether a backward pass follows.
        kind: what else the work depends on, in the method's own words; ``""`` for a plain call.
    """

    sample: tuple[int, ...]
    text: tuple[int, ...]
    grad: bool
    kind: str

    def __str__(self) -> str:
        words = [f"batch {self.sample[0]}", self.kind, "with gradients" if self.grad else ""]
        return ", ".join(filter(None, words))


class CallLog:
    """A context that logs the calls of a U-Net and their times.

    Args:
        unet: the module that the method calls.
        kind: gives the kind of the n-th call, counted from 0, see :class:`CallKey`.
    """

    def __init__(self, unet: torch.nn.Module, kind: Callable[[int], str]) -> None:
        self.keys: list[CallKey] = []
        self._unet, self._kind = unet, kind
        self._starts: list[Any] = []
        self._ends: list[Any] = []
        self._hooks: list[Any] = []
        self._last: Tensor | None = None

    def __enter__(self) -> CallLog:
        self._hooks = [
            self._unet.register_forward_pre_hook(self._before, with_kwargs=True),
            self._unet.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def seconds(self, images: int = 1) -> float:
        """The time from the start of the first call to the end of the last; waits for the device.

        For several pictures, which must take equally many calls each, it is the sum over the pictures, without the time
        between them.
        """
        calls, rest = divmod(len(self.keys), images)
        if rest:
            raise ValueError(f"{len(self.keys)} calls are not as many for each of {images} pictures")
        firsts, lasts = self._starts[::calls], self._ends[calls - 1 :: calls]
        return sum(_seconds(first, last) for first, last in zip(firsts, lasts, strict=True))

    def finite(self) -> bool:
        """Whether the last call returned finite numbers, and so the earlier ones did, too. Waits for the device."""
        assert self._last is not None
        return bool(self._last.isfinite().all())

    def milliseconds(self) -> dict[str, float]:
        """The median time of a call of each kind, by its key as text.

        The time of a call with gradients ends where the next call starts, because the backward pass lies between.
        """
        until = [following if key.grad else end for key, end, following in self._with_next()]
        times: dict[str, list[float]] = defaultdict(list)
        for key, start, end in zip(self.keys, self._starts, until, strict=True):
            times[str(key)].append(1e3 * _seconds(start, end))
        return {kind: median(each) for kind, each in times.items()}

    def _with_next(self) -> Iterator[tuple[CallKey, Any, Any]]:
        return zip(self.keys, self._ends, [*self._starts[1:], self._ends[-1]], strict=True)

    def _before(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        key = CallKey(tuple(args[0].shape), tuple(text.shape), torch.is_grad_enabled(), self._kind(len(self.keys)))
        self.keys.append(key)
        if isinstance(unet, CountedUNet):
            unet.key = key
        self._starts.append(_mark(args[0].device))

    def _after(self, unet: Any, args: tuple[Any, ...], out: Any) -> None:
        self._ends.append(_mark(args[0].device))
        self._last = (out[0] if isinstance(out, tuple) else out.sample).detach()


def _mark(device: torch.device) -> Any:
    """A point in time: on CUDA an event, for which nothing has to wait inside the loop."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class CountedUNet(UNet2DConditionModel):
    """A U-Net without weights that counts the multiply-accumulates of its calls and returns zeros on the CPU.

    For each distinct :class:`CallKey` the call runs once on the meta device, with everything that a method has done to
    the U-Net (attention processors, hooks, patched blocks). It may be called only inside a :class:`CallLog`.
    """

    key: CallKey
    macs: dict[CallKey, int]

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> CountedUNet:
        """Turn a U-Net on the meta device into one that counts."""
        unet.__class__ = cls
        assert isinstance(unet, CountedUNet)
        unet.macs = {}
        return unet

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs."""
        return torch.device("cpu")

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        if self.key not in self.macs:
            with FlopCounterMode(display=False) as counter:
                self.compute(sample.to("meta"), timestep, encoder_hidden_states.to("meta"), **kwargs)
            self.macs[self.key] = counter.get_total_flops() // 2
        out = sample.new_zeros(len(sample), self.config["out_channels"], *sample.shape[2:])
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def compute(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> None:
        """Run the call itself on the meta device, where its multiplications are counted."""
        super().forward(sample, timestep, encoder_hidden_states, **kwargs)


class NoVAE(AutoencoderKL):
    """An autoencoder that computes nothing: its pictures and latents have the right shapes and are all zero."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        moments = x.new_zeros(len(x), 2 * self.config["latent_channels"], x.shape[2] // 8, x.shape[3] // 8)
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> Any:
        image = z.new_zeros(len(z), 3, 8 * z.shape[2], 8 * z.shape[3])
        return DecoderOutput(sample=image) if return_dict else (image,)
