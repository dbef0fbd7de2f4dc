"""The dense graphs of a base and of the controlled steps: what is kept, and what is put in its place."""

from __future__ import annotations

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
    HEADS,
    HEIGHT,
    PIXELS,
    TOKENS,
    WIDTH,
    HandBuilt,
    aten,
    copy_of,
    inputs,
    only,
)
from torch.fx import GraphModule
from torch.nn import functional as F

from fisedit_compile.ir.requests import CacheEntry, ControlTensor, requests_of
from fisedit_compile.kernels.norms.group_norm_rows import norm_scale_shift
from fisedit_compile.passes.dense.control_cross_attention import control_cross_attention
from fisedit_compile.passes.dense.record_activations import record_activations
from fisedit_compile.passes.text_attention import text_attentions
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = aten.scaled_dot_product_attention.default


def attentions(scale: float | None = None) -> GraphModule:
    """Group norm, self-attention, cross-attention."""
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    tokens = build.tokens(build.op(aten.group_norm.default, sample, 2, None, None, 1e-3, path="norm"))
    options = {} if scale is None else {"scale": scale}
    for keys, path in ((tokens, "attn1"), (text, "attn2")):
        query, key = build.heads(tokens), build.heads(keys)
        out = build.op(aten.transpose.int, build.op(ATTENTION, query, key, key, path=path, **options), 1, 2)
        tokens = build.op(aten.reshape.default, out, [BATCH, PIXELS, CHANNELS])
    return build.output(tokens)


def test_maps_are_kept_pixel_major_whatever_their_form() -> None:
    dense = attentions()
    names = ["group_norm_default", "reshape_default", "transpose_int"]
    recorder = copy_of(dense)
    report = record_activations(recorder, [CacheEntry(name, "map") for name in names], BATCH)
    assert report.changed == 3
    values = inputs(dense, 0)
    out, (norm, tokens, heads) = recorder(*values)
    assert torch.equal(out, dense(*values))
    expected = F.group_norm(values[0], 2, eps=1e-3)
    pixels = expected.permute(0, 2, 3, 1).reshape(BATCH * HEIGHT * WIDTH, CHANNELS)
    assert_close(norm, pixels)
    assert_close(tokens, pixels)
    assert_close(heads, pixels.view(-1, HEADS, CHANNELS // HEADS))
    assert all(kept.is_contiguous() for kept in (norm, tokens, heads))


def test_what_is_kept_is_no_view_of_an_input() -> None:
    """A caller may write to its latents afterwards."""
    build = HandBuilt()
    tokens = build.tokens(build.latents())
    dense = build.output(build.op(aten.silu.default, tokens))
    recorder = copy_of(dense)
    record_activations(recorder, [CacheEntry(tokens.name, "map")], BATCH)
    (sample,) = inputs(dense, 0)
    channels_last = sample.to(memory_format=torch.channels_last)
    _, (kept,) = recorder(channels_last)
    before = kept.clone()
    channels_last.zero_()
    assert torch.equal(kept, before)


def affine(weight: bool, bias: bool) -> tuple[GraphModule, list[torch.Tensor | None]]:
    """One group norm; its weight and bias, None where it has none."""
    build = HandBuilt()
    sample = build.latents()
    given = [build.weight(CHANNELS) if wanted else None for wanted in (weight, bias)]
    dense = build.output(build.op(aten.group_norm.default, sample, 2, *given, 1e-3))
    return dense, [node and node.meta["val"] for node in given]


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_group_norm_is_kept_as_what_it_does_to_each_channel(weight: bool, bias: bool) -> None:
    dense, (scales, shifts) = affine(weight, bias)
    recorder = copy_of(dense)
    record_activations(recorder, [CacheEntry("group_norm_default", kind) for kind in ("shift", "scale")], BATCH)
    assert len(recorder.graph.find_nodes(op="call_function", target=norm_scale_shift)) == 1  # once for both
    (sample,) = inputs(dense, 0)
    out, (shift, scale) = recorder(sample)
    assert scale.shape == shift.shape == (BATCH, CHANNELS)
    assert_close(sample * scale[:, :, None, None] + shift[:, :, None, None], out)
    groups = sample.view(BATCH, 2, -1)
    rstd = ((groups.var(2, correction=0) + 1e-3) ** -0.5).repeat_interleave(CHANNELS // 2, 1)
    assert_close(scale, rstd if scales is None else rstd * scales)
    mean = groups.mean(2).repeat_interleave(CHANNELS // 2, 1)
    assert_close(shift, -mean * scale if shifts is None else shifts - mean * scale)


def test_scale_and_shift_are_at_least_fp32() -> None:
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half() * 100
    weight, bias = (torch.randn(8, generator=torch.Generator().manual_seed(seed)).half() for seed in (1, 2))
    for dtype, wide in ((torch.half, torch.float32), (torch.bfloat16, torch.float32), (torch.double, torch.double)):
        scale, shift = norm_scale_shift(x.to(dtype), 2, weight.to(dtype), bias.to(dtype), 1e-5)
        assert scale.dtype == shift.dtype == wide
        exact = x.to(dtype).double().view(2, 2, -1)
        rstd, mean = (
            each.repeat_interleave(4, 1) for each in ((exact.var(2, correction=0) + 1e-5) ** -0.5, exact.mean(2))
        )
        assert_close(scale.float(), rstd * weight.to(dtype).double())
        assert_close(shift.float(), bias.to(dtype).double() - mean * rstd * weight.to(dtype).double())


def test_a_value_of_the_timestep_is_kept_as_it_is_and_no_view_of_an_input() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    embedding = build.op(aten.reshape.default, timestep, [BATCH, 1, 1, 1])
    dense = build.output(build.op(aten.add.Tensor, sample, embedding))
    recorder = copy_of(dense)
    record_activations(recorder, [CacheEntry(embedding.name, "value")], BATCH)
    values = [each.clone() for each in inputs(dense, 0)]
    _, (kept,) = recorder(*values)
    before = values[1].clone()
    values[1].zero_()
    assert torch.equal(kept, before.view(BATCH, 1, 1, 1))


def test_attention_maps_are_those_of_the_last_samples() -> None:
    for scale in (None, 0.3):
        dense = attentions(scale)
        (cross,) = text_attentions(dense.graph)
        assert cross.meta["module_path"] == "attn2"
        recorder = copy_of(dense)
        record_activations(recorder, [CacheEntry(cross.name, "attention")], samples=1)
        values = inputs(dense, 0)
        _, (maps,) = recorder(*values)
        assert maps.shape == (PIXELS, HEADS, TOKENS)
        assert_close(maps.sum(-1), torch.ones(PIXELS, HEADS, dtype=maps.dtype))
        maps = maps.transpose(0, 1)[None]
        value = values[1].unflatten(2, (HEADS, -1)).transpose(1, 2)
        assert_close((maps @ value[1:]).transpose(1, 2).flatten(2), dense(*values)[1:])


def test_cross_attention_takes_maps_and_alignment_as_inputs() -> None:
    dense = attentions()
    (cross,) = text_attentions(dense.graph)
    controlled = copy_of(dense)
    report = control_cross_attention(controlled, CONFIG)
    controlled.graph.lint()
    assert report.changed == 1
    control = [ControlTensor(kind) for kind in ("mapper", "keep", "weight")]
    assert requests_of(controlled.graph) == [CacheEntry(cross.name, "attention"), *control]
    assert only(controlled, ATTENTION).meta["module_path"] == "attn1"  # self-attention stays
