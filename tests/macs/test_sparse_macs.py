"""MACs of sparse steps: against what each module's own shapes say, the published models, and the report's text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.unets import UNets
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.architectures import build_unet
from fisedit_compile.editing.step_macs import StepMacs
from fisedit_compile.errors import MaskError, SparsifyError
from fisedit_compile.macs.counter import MacCounter, count_dense, count_macs, count_prompt, count_step
from fisedit_compile.macs.mask_sets import count_masks
from fisedit_compile.masks.sample_masks import read_masks

#: Real masks, which are not part of the project: see the benchmarks.
REAL_MASKS = Path(__file__).parents[3] / "shared" / "data" / "fisedit_masks_96.npz"
TOKENS = 77


def random_mask(*shape: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def by_hand(
    unet: Any, inputs: Any, masks: Tensor, *, attention: str, dense_below: int
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """MACs of each module in a sparse step, once an edit and once a base, from what the modules say in a dense call.

    Layers that read one value are one product, of the innermost module that holds them all: ``""`` is the U-Net.

    Args:
        masks: bool ``[B, h, w]``, one a sample of the batch.
    """
    step, edit, base = Counter[str](), Counter[str](), Counter[str]()
    pooled = unet.config.addition_embed_type is not None  # the prompt is part of the time embedding
    shortcuts = {path for path, _ in unet.named_modules() if path.endswith("conv_shortcut")}
    sizes = {}  # tokens -> the resolution, or what stays dense
    size = tuple(masks.shape[1:])
    while min(size) >= 1 and np.prod(size) not in sizes:
        sizes[int(np.prod(size))] = size
        size = tuple((side + 1) // 2 for side in size)

    def rows(size: tuple[int, ...]) -> list[int]:
        """Pixels of each sample that are computed."""
        if min(size) < dense_below:
            return [int(np.prod(size))] * len(masks)
        pooled = F.adaptive_max_pool2d(masks[:, None].float(), size)
        return pooled.flatten(1).sum(1).long().tolist()

    def watch(path: str) -> Any:
        def count(module: Any, given: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
            if isinstance(module, torch.nn.Conv2d):
                weight = module.in_channels * module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                joined = re.sub(r"conv2$", "conv_shortcut", path) in shortcuts  # one product with what it is added to
                step[path.rpartition(".")[0] if joined else path] += sum(rows(tuple(out.shape[2:]))) * weight
            elif isinstance(module, torch.nn.Linear):
                weight = module.in_features * module.out_features
                if given[0].shape[1:-1] == (TOKENS,):  # keys and values of all cross-attentions
                    edit[""] += given[0][..., 0].numel() * weight
                elif path.startswith("add_embedding"):  # pooled text, and the picture's size
                    edit[path] += given[0].shape[0] * weight
                elif given[0].ndim == 2 and pooled and path.endswith("time_emb_proj"):
                    step[""] += given[0].shape[0] * weight
                elif given[0].ndim == 2:  # the time embedding, which has no pixels
                    base[path] += given[0].shape[0] * weight
                else:
                    merged = re.sub(r"(?<=attn1)\.to_[qkv]$", "", path)
                    step[merged] += sum(rows(sizes[given[0].shape[1]])) * weight
            elif isinstance(module, Attention):
                size = sizes[given[0].shape[1]]
                text = options.get("encoder_hidden_states")
                for queries in rows(size):
                    keys = TOKENS if text is not None else int(np.prod(size))
                    if text is None and attention == "masked":
                        keys = queries
                    step[path] += 2 * queries * keys * module.inner_dim

        return count

    handles = [m.register_forward_hook(watch(path), with_kwargs=True) for path, m in unet.named_modules()]
    with torch.no_grad():
        unet(*inputs[0], **inputs[1])
    for handle in handles:
        handle.remove()
    return nonzero(step), nonzero(edit), nonzero(base)


def nonzero(by_module: Any) -> dict[str, int]:
    return {path: macs for path, macs in by_module.items() if macs}


@pytest.mark.parametrize(
    ("arch", "batch", "size", "attention", "dense_below"),
    [
        ("micro", 2, (16, 16), "full", 4),
        ("micro", 4, (13, 10), "masked", 4),
        ("micro", 1, (13, 10), "full", 10),
        ("tiny-sdxl", 2, (16, 24), "masked", 8),
    ],
)
def test_each_module_of_a_step_has_the_macs_of_its_rows(
    unets: UNets, arch: str, batch: int, size: tuple[int, int], attention: str, dense_below: int
) -> None:
    sparse = unets.sparse(arch, attention=attention, dense_below=dense_below)
    lowered = sparse.program(unets.call(sparse, arch, batch, size)).lowered
    masks = random_mask(max(batch // 2, 1), *size, share=0.1)
    masks[0, :, : size[1] // 2] = False  # samples with different numbers of rows
    counter = MacCounter(lowered)  # whose stages fvcore counts, too
    count = counter.step(counter.plan(masks))
    in_batch = masks.repeat(batch // len(masks), 1, 1)
    inputs = unets.inputs(arch, batch, size)
    expected = by_hand(unets.dense(arch), inputs, in_batch, attention=attention, dense_below=dense_below)
    assert tuple(nonzero(each.by_module) for each in (count, counter.prompt, counter.timestep)) == expected
    for breakdown in (count.by_op, count.by_resolution, count.by_module):
        assert sum(breakdown.values()) == count.total
    assert next(iter(count.by_resolution)) == "{}x{}".format(*size)
    assert count_step(lowered, counter.plan(masks), check=False) == count
    assert count_prompt(lowered, check=False) == counter.prompt


@pytest.mark.parametrize("attention", ["full", "masked"])
@pytest.mark.parametrize(("batch", "size"), [(2, (16, 16)), (4, (13, 10))])
def test_a_step_of_the_whole_picture_is_a_dense_call_without_text_and_time(
    unets: UNets, batch: int, size: tuple[int, int], attention: str
) -> None:
    """All that differs is what moved to prompt and base: taps outside the picture count in both, norms in neither."""
    sparse = unets.sparse("micro", attention=attention)
    counter = MacCounter(sparse.program(unets.call(sparse, "micro", batch, size)).lowered, check=False)
    whole = counter.report(edit_size=1.0)
    assert whole.edit_size == 1.0
    once = counter.prompt.total + counter.timestep.total
    assert whole.total + once == counter.dense.total == count_dense(counter.lowered, check=False).total
    assert counter.prompt.by_op == {"convolution": 0, "linear": counter.prompt.total, "attention": 0}


def test_more_pixels_are_more_work_and_masked_attention_is_less(unets: UNets) -> None:
    counters = {}
    for attention in ("full", "masked"):
        sparse = unets.sparse("micro", attention=attention)
        lowered = sparse.program(unets.call(sparse, "micro", 4, (16, 16))).lowered
        counters[attention] = MacCounter(lowered, check=False)

    @given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
    def grows(seed: int, share: float, more: float) -> None:
        totals = {}
        mask = random_mask(2, 16, 16, share=share, seed=seed)
        larger = mask | random_mask(2, 16, 16, share=more, seed=seed + 1)
        for attention, counter in counters.items():
            small, large = (counter.report(mask=each) for each in (mask, larger))
            assert small.total <= large.total <= counter.dense.total
            assert all(small.by_resolution[name] <= large.by_resolution[name] for name in large.by_resolution)
            totals[attention] = small.total
        assert totals["masked"] <= totals["full"]
        assert (totals["masked"] < totals["full"]) == bool(mask.any() and not mask.all())

    grows()


@pytest.fixture(scope="module")
def sd2() -> MacCounter:
    return MacCounter.of("sd2", height=768, width=768)


def test_figures_of_stable_diffusion_2(sd2: MacCounter) -> None:
    measured = {0.05: 196.273, 0.15: 409.816, 0.30: 737.596}
    for edit_size, most, ratio in ((0.05, 200e9, 10.5), (0.15, 415e9, 5.0), (0.30, 745e9, 2.8)):
        report = sd2.report(edit_size=edit_size)
        assert report.edit_size == pytest.approx(edit_size, rel=0.05)
        assert report.total <= most
        assert report.ratio >= ratio
        assert report.total / 1e9 == pytest.approx(measured[edit_size], abs=1e-3)
    assert sd2.dense.total / 1e9 == pytest.approx(2149.106, abs=1e-3)
    assert report.by_resolution["12x12"] == sd2.dense.by_resolution["12x12"]  # below dense_below


def test_masked_attention_is_less(sd2: MacCounter) -> None:
    masked = MacCounter.of(build_unet("sd2", device="meta"), height=768, width=768, attention="masked")
    for edit_size, most in ((0.05, 168.0), (0.15, 331.0), (0.30, 606.0)):
        report = masked.report(edit_size=edit_size)
        assert report.total / 1e9 <= most
        assert report.total < sd2.report(edit_size=edit_size).total
        assert report.by_op["convolution"] == sd2.report(edit_size=edit_size).by_op["convolution"]


def test_figures_of_the_real_masks(sd2: MacCounter) -> None:
    if not REAL_MASKS.is_file():
        pytest.skip("the real masks are not there: shared/data/fisedit_masks_96.npz beside the project")
    counts = count_masks(sd2, read_masks(REAL_MASKS))
    assert (len(counts.reports), counts.empty) == (98, 2)
    assert counts.mean_with_empty < counts.mean.total <= 670e9
    assert counts.mean.ratio >= 3.2
    assert counts.percentile(5) < counts.percentile(50) < counts.percentile(95) < sd2.dense.total
    assert counts.of_empty == counts.mean.by_resolution["12x12"]
    assert sd2.dense.by_resolution["none"] == sd2.prompt.total + sd2.timestep.total


def test_the_mean_of_masks_is_that_of_their_counts(unets: UNets) -> None:
    sparse = unets.sparse("micro")
    counter = MacCounter(sparse.program(unets.call(sparse, "micro", 2, (16, 16))).lowered, check=False)
    masks = torch.stack([random_mask(16, 16, share=share) for share in (0.0, 0.1, 0.5, 0.0)])
    counts = count_masks(counter, masks)
    totals = [counter.report(mask=mask).total for mask in masks]
    assert counts.empty == 2
    assert counts.mean.total == pytest.approx((totals[1] + totals[2]) / 2, abs=2)
    assert counts.mean.edit_size == pytest.approx(float(masks[1:3].float().mean()))
    assert counts.mean_with_empty == sum(totals) / 4
    assert counts.of_empty == totals[0] < totals[1]
    row = counts.to_dict()
    assert (row["p5"], row["p95"]) == tuple(np.percentile(totals[1:3], (5, 95)))
    assert [each["macs_sparse"] for each in row["each"]] == totals[1:3]
    with pytest.raises(ValueError, match="none of the 2 masks has an active pixel"):
        count_masks(counter, masks[[0, 3]])


def test_a_model_is_counted_in_one_call(unets: UNets) -> None:
    options = {"attention": "masked", "config": {"dense_below": 8}}
    pipeline = SimpleNamespace(unet=unets.dense("micro"), vae_scale_factor=4)
    report = count_macs(pipeline, height=40, width=52, edit_size=0.2, **options)
    assert (report.height, report.width, report.batch, report.attention) == (40, 52, 2, "masked")
    assert report.prompt is not None
    assert report.total < report.dense.total - report.prompt.total
    assert report.by_resolution.get("none", 0) == 0  # text and time embedding are no part of a step
    assert report.dense == count_macs(pipeline, height=40, width=52).dense
    row = report.to_dict()
    assert (row["macs_sparse"], row["macs_prompt"]) == (report.total, report.prompt.total)
    assert row["by_resolution"]["5x7"]["sparse"] == row["by_resolution"]["5x7"]["dense"] > 0  # below dense_below
    assert f"once an edit: {report.prompt.total / 1e9:,.2f} G" in str(report)


def test_masks_may_come_in_many_forms(unets: UNets) -> None:
    sparse = unets.sparse("micro")
    counter = MacCounter(sparse.program(unets.call(sparse, "micro", 4, (13, 10))).lowered, check=False)
    mask = random_mask(13, 10, share=0.3)
    large = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    forms = [mask, mask[None], mask.numpy(), large, large.float()[None, None], Image.fromarray(large.numpy()), [mask]]
    reports = [counter.report(mask=form) for form in forms]
    assert all(report == reports[0] for report in reports)
    assert reports[0].edit_size == pytest.approx(float(mask.double().mean()))
    two = counter.report(mask=[mask, ~mask])
    assert two.edit_size == 0.5
    assert counter.report(mask=torch.stack([mask, ~mask])) == two
    assert counter.report(mask=torch.zeros(13, 10, dtype=torch.bool)).by_resolution["13x10"] == 0


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"edit_size": 0.0}, ValueError, r"edit_size is 0\.0: .* in \(0, 1\]"),
        ({"edit_size": 1.5}, ValueError, r"edit_size is 1\.5"),
        ({"edit_size": float("nan")}, ValueError, "edit_size is nan"),
        ({}, ValueError, "one of the two"),
        ({"edit_size": 0.1, "mask": torch.ones(13, 10, dtype=torch.bool)}, ValueError, "one of the two"),
        ({"mask": torch.ones(10, 13, dtype=torch.bool)}, MaskError, "a mask of 10x13 for latents of 13x10"),
        ({"mask": torch.ones(3, 13, 10, dtype=torch.bool)}, MaskError, "4 is not a multiple of the 3 masks"),
        ({"mask": torch.ones(1, 3, 13, 10)}, MaskError, "shape"),
        ({"mask": torch.zeros(26, 20)}, MaskError, "no active pixel"),
        ({"mask": "left half"}, MaskError, "a str was given as mask"),
    ],
)
def test_bad_edits_are_named(unets: UNets, edit: dict[str, Any], error: type[Exception], message: str) -> None:
    sparse = unets.sparse("micro")
    counter = MacCounter(sparse.program(unets.call(sparse, "micro", 4, (13, 10))).lowered, check=False)
    with pytest.raises(error, match=message):
        counter.report(**edit)


def test_bad_models_are_named() -> None:
    with pytest.raises(SparsifyError, match="nothing to make sparse"):
        count_macs("tiny", height=64, width=64, edit_size=0.1)
    with pytest.raises(ValueError, match="attention='some'"):
        count_macs("tiny", height=128, width=128, edit_size=0.1, attention="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="edit_size is 2"):
        count_macs("sd2", height=768, width=768, edit_size=2)


def test_an_edit_reports_its_macs(unets: UNets) -> None:
    sparse = unets.sparse("micro", attention="masked")
    call = unets.call(sparse, "micro", 2, (16, 16))
    prepared = sparse.prepare(call, random_mask(1, 16, 16, share=0.2))
    lowered = sparse.program(call).lowered
    macs = StepMacs(lowered, prepared.plan.mask, dense=False).count()
    dense, step = count_dense(lowered, check=False).total, count_step(lowered, prepared.plan, check=False).total
    assert macs == {"dense_step": dense, "sparse_step": step, "ratio": dense / step}
    over = StepMacs(lowered, prepared.plan.mask, dense=True)  # a mask over ``dense_above``
    assert over.count() == {"dense_step": dense, "sparse_step": dense, "ratio": 1.0}
