"""Images made on a device are those that diffusers makes on the host, to the last level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor

from fisedit_compile.editing.quick_pictures import quick

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_images_are_diffusers_own(dtype: torch.dtype, device: str) -> None:
    decoded = torch.linspace(-1.3, 1.3, 2 * 3 * 40 * 24).view(2, 3, 40, 24).to(device, dtype)
    halves = (torch.arange(256).view(1, 1, 16, 16) + 0.5).expand(2, 3, 16, 16) / 255 * 2 - 1
    for pictures in (decoded, halves.to(device, dtype)):
        for processor in (VaeImageProcessor(), VaeImageProcessor(do_normalize=False)):
            for options in ({}, {"do_denormalize": [True, False]}):
                own = quick(processor).postprocess(pictures, output_type="pil", **options)
                theirs = processor.postprocess(pictures, output_type="pil", **options)
                for one, other in zip(own, theirs, strict=True):
                    assert one.mode == other.mode
                    assert np.array_equal(np.asarray(one), np.asarray(other))


def test_other_kinds_of_pictures_are_left_to_diffusers() -> None:
    processor, decoded = VaeImageProcessor(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = quick(processor)
    assert own is not processor
    assert "postprocess" not in vars(processor)
    assert torch.equal(own.postprocess(decoded, "pt"), processor.postprocess(decoded, "pt"))
    assert np.array_equal(own.postprocess(decoded, "np"), processor.postprocess(decoded, "np"))
    assert torch.equal(own.postprocess(decoded, "latent"), decoded)
    gray = own.postprocess(decoded[:, :1])[0]
    assert np.array_equal(np.asarray(gray), np.asarray(processor.postprocess(decoded[:, :1])[0]))


@pytest.mark.parametrize("name", ["postprocess", "numpy_to_pil"])
def test_a_processor_whose_methods_were_replaced_is_left_alone(name: str) -> None:
    processor = VaeImageProcessor()
    setattr(processor, name, lambda *_, **__: [])
    assert quick(processor) is processor


def test_a_processor_of_another_class_is_left_alone() -> None:
    processor = PixArtImageProcessor()
    assert quick(processor) is processor
