"""The sparse decoder against the autoencoder's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.vaes import KINDS, Decodes, small_vae

import fisedit_compile.vae.sparse_decoder as sparse_decoder
from fisedit_compile.errors import CaptureError
from fisedit_compile.masks.grown import grown
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.testing import assert_close
from fisedit_compile.vae.decoder import can_be_sparse
from fisedit_compile.vae.sparse_decoder import SparseDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sparse_decoder.DENSE_ABOVE, "cpu", 1.0)


@pytest.fixture(scope="module", params=[(kind, fixed) for kind in KINDS for fixed in (False, True)], ids=str)
def decodes(request: pytest.FixtureRequest) -> Decodes:
    kind, fixed_sizes = request.param
    return Decodes(kind, fixed_sizes=fixed_sizes)


def squares() -> torch.Tensor:
    """Another square in each of two samples."""
    mask = torch.zeros(2, 12, 9, dtype=torch.bool)
    mask[0, 2:6, 1:5] = mask[1, 8:12, 6:9] = True
    return mask


def test_a_recording_has_the_bits_of_the_autoencoder(decodes: Decodes) -> None:
    assert torch.equal(decodes.picture, decodes.dense(decodes.latents))


def test_it_keeps_the_picture_and_statistics_alone(decodes: Decodes) -> None:
    cache = decodes.base.cache
    maps = [tensor for entry, tensor in cache.items() if entry.kind == "map"]
    assert len(maps) == 1
    assert torch.equal(maps[0].view(2, *decodes.picture.shape[2:], 3).permute(0, 3, 1, 2), decodes.picture)
    assert all(tensor.ndim == 2 and len(tensor) == 2 for entry, tensor in cache.items() if entry.kind != "map")


def test_the_base_s_latents_give_its_picture(decodes: Decodes) -> None:
    out = decodes.sparse(decodes.latents)
    assert torch.equal(out, decodes.picture)
    assert out.data_ptr() != decodes.picture.data_ptr()


def test_rows_everywhere_are_the_dense_decode_of_the_base(decodes: Decodes) -> None:
    """Wherever a cell changed by hardly anything: its statistics are still those of the base."""
    out = decodes.sparse(decodes.latents + 1e-7)
    assert not torch.equal(out, decodes.picture)
    assert_close(out, decodes.picture)


def test_pixels_away_from_the_change_are_the_base_s_bits(decodes: Decodes) -> None:
    for cells in (0, 1):
        mask = squares()
        out = decodes.sparse(decodes.changed(mask), cells)
        outside = ~decodes.pixels(grown(mask, cells))
        assert torch.equal(out[outside], decodes.picture[outside])
        assert not torch.equal(out, decodes.picture)


def test_a_larger_region_comes_nearer_to_all_pixels(decodes: Decodes) -> None:
    """Not exactly, since the latents' level, which is whole, carries a change everywhere by its norms."""
    mask = torch.zeros(2, 12, 9, dtype=torch.bool)
    mask[:, 5, 4] = True
    latents = decodes.changed(mask)
    everywhere = decodes.sparse(latents, 12)
    inside = decodes.pixels(mask)
    off = [(decodes.sparse(latents, cells) - everywhere).abs()[inside].max() for cells in (0, 2, 4)]
    assert off[0] > off[1] >= off[2]
    assert off[2] < 0.02 * off[0]


def test_samples_are_decoded_as_alone(decodes: Decodes) -> None:
    mask = squares()
    both = decodes.sparse(decodes.changed(mask), 1)
    for sample in (0, 1):
        alone = mask.clone()
        alone[1 - sample] = False
        out = decodes.sparse(decodes.changed(alone), 1)
        assert_close(out[sample], both[sample])
        assert torch.equal(out[1 - sample], decodes.picture[1 - sample])


def test_many_regions_one_after_the_other(decodes: Decodes) -> None:
    random = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, 12, 9, generator=random) < density for density in (0.02, 0.9, 0.1, 0.0, 0.5)]
    first = [decodes.sparse(decodes.changed(mask)) for mask in masks]
    again = [decodes.sparse(decodes.changed(mask)) for mask in reversed(masks)]
    assert all(torch.equal(*pair) for pair in zip(first, reversed(again), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_sizes_give_what_the_region_s_own_give(kind: str) -> None:
    own, fixed = Decodes(kind), Decodes(kind, fixed_sizes=True)
    latents = own.changed(squares())
    assert_close(fixed.sparse(latents, 1), own.sparse(latents, 1))
    prepared = fixed.prepare(latents, cells=1)
    assert prepared.bucket is not None


def test_half_precision() -> None:
    decodes = Decodes("kl", torch.bfloat16)
    out = decodes.sparse(decodes.changed(squares()), 1)
    assert out.dtype is torch.bfloat16
    exact = decodes.in_full_precision("kl")
    assert_close(out, exact.sparse(exact.changed(squares()), 1).bfloat16(), dtype=torch.bfloat16)


class TestState:
    @pytest.fixture
    def decodes(self) -> Decodes:
        return Decodes("kl", samples=1)

    def test_weights_written_in_place_are_followed(self, decodes: Decodes) -> None:
        with torch.no_grad():
            decodes.vae.decoder.conv_out.weight.mul_(2)
        picture, base = decodes.decoder.record(decodes.latents, decodes.state)
        assert torch.equal(picture, decodes.dense(decodes.latents))
        assert_close(decodes.sparse(decodes.latents + 1e-7, base=base), picture)
        assert len(list(decodes.decoder._programs)) == 1

    def test_a_base_of_other_weights_is_refused(self, decodes: Decodes) -> None:
        with torch.no_grad():
            decodes.vae.decoder.conv_out.weight.mul_(2)
        with pytest.raises(CaptureError, match="the VAE is another one than the base was decoded with"):
            decodes.sparse(decodes.changed(squares()[:1]))

    def test_another_behaviour_is_captured_anew(self, decodes: Decodes) -> None:
        decodes.vae.decoder.conv_act = torch.nn.ReLU()
        picture, base = decodes.decoder.record(decodes.latents, decodes.state)
        assert torch.equal(picture, decodes.dense(decodes.latents))
        assert not torch.equal(picture, decodes.picture)
        assert_close(decodes.sparse(decodes.latents + 1e-7, base=base), picture)
        assert len(list(decodes.decoder._programs)) == 2

    def test_latents_of_another_kind_are_refused(self, decodes: Decodes) -> None:
        with pytest.raises(CaptureError, match=r"latents \[2, 4, 12, 9\] torch.float32 on cpu, those of the base"):
            decodes.sparse(decodes.latents.repeat(2, 1, 1, 1))

    def test_a_region_of_nearly_all_is_refused(self, decodes: Decodes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sparse_decoder.DENSE_ABOVE, "cpu", 0.8)
        with pytest.raises(CaptureError, match="100% of the picture would be decoded"):
            decodes.sparse(decodes.other)


def tile(vae: Any) -> None:
    vae.enable_tiling()


def slice_(vae: Any) -> None:
    vae.enable_slicing()


def train(vae: Any) -> None:
    vae.train()


def exchange(vae: Any) -> None:
    vae.decode = torch.compile(vae.decode)


def offload(vae: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(vae, torch.device("cpu"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (tile, "tiling of the VAE is on"),
            (slice_, "slicing of the VAE is on"),
            (train, "the VAE is in training mode"),
            (exchange, "decode of the VAE was replaced"),
            (offload, "a hook of the VAE brings or casts its weights"),
        ],
    )
    def test_a_decoder_that_no_graph_stands_for(self, change: Callable[[Any], None], message: str) -> None:
        vae = small_vae("kl")
        change(vae)
        before, watch, decoder = vae.training, ModelWatch(vae), SparseDecoder(vae)
        with pytest.raises(CaptureError, match=message):
            decoder.record(torch.randn(1, 4, 8, 8), watch.look())
        assert vae.training is before

    def test_latents_of_another_dtype(self) -> None:
        vae = small_vae("kl")
        watch = ModelWatch(vae)
        with pytest.raises(CaptureError, match=r"latents of torch.float64 for a VAE of torch.float32"):
            SparseDecoder(vae).record(torch.randn(1, 4, 8, 8, dtype=torch.float64), watch.look())

    def test_another_vae_than_was_looked_at(self) -> None:
        vae, watch = small_vae("kl"), ModelWatch(small_vae("kl"))
        with pytest.raises(CaptureError, match="exchanged on the way"):
            SparseDecoder(vae).record(torch.randn(1, 4, 8, 8), watch.look())

    def test_what_cannot_be_captured_is_tried_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vae = small_vae("kl")
        vae.decoder.conv_act = Draws()
        watch, decoder = ModelWatch(vae), SparseDecoder(vae)
        for _ in range(2):
            with pytest.raises(CaptureError, match="the VAE cannot be captured"):
                decoder.record(torch.randn(1, 4, 8, 8), watch.look())
            monkeypatch.setattr(sparse_decoder, "DecoderProgram", None)

    def test_classes(self) -> None:
        from diffusers import AsymmetricAutoencoderKL, ConsistencyDecoderVAE

        assert can_be_sparse(small_vae("kl"))
        assert can_be_sparse(small_vae("tiny"))
        assert not any(can_be_sparse(kind.__new__(kind)) for kind in (AsymmetricAutoencoderKL, ConsistencyDecoderVAE))
        assert not can_be_sparse(None)


class Draws(torch.nn.Module):
    """An activation that asks for a value, which no graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
