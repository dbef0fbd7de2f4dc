"""The mask found from two generations' latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_otsu

from fisedit_compile.errors import MaskError
from fisedit_compile.masks.difference_mask import difference, difference_mask, find_region, otsu_threshold


def generations(
    boxes: list[tuple[slice, slice]], steps: int = 4, size: tuple[int, int] = (32, 24)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [steps, n, 4, h, w] of a base and of an edit that changes one box a sample, over noise."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(steps, len(boxes), 4, *size, generator=generator)
    edit = base + 0.01 * torch.randn(base.shape, generator=generator)
    for sample, (rows, columns) in enumerate(boxes):
        region = edit[:, sample, :, rows, columns]
        region += 1 + 0.1 * torch.randn(region.shape, generator=generator)
    return base, edit


class TestDifference:
    def test_is_the_formula_of_the_paper(self) -> None:
        base, edit = torch.randn(2, 3, 2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
        total = (base - edit).double().abs().sum(dim=(0, 2))
        for sample, found in enumerate(difference(base, edit)):
            span = total[sample].max() - total[sample].min()
            expected = (total[sample] - total[sample].min()) / span
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("offset", [0.0, 0.5])
    def test_a_constant_difference_is_zero(self, offset: float) -> None:
        base = torch.zeros(2, 1, 4, 3, 3)
        assert torch.equal(difference(base, base + offset), torch.zeros(1, 3, 3))

    def test_half_precision_is_summed_in_fp32(self) -> None:
        base = torch.zeros(1, 1, 4, 2, 2, dtype=torch.float16)
        edit = torch.full_like(base, 40000.0)
        edit[..., 0, 0] = 0
        assert difference(base, edit).dtype == torch.float32
        assert difference(base, edit).flatten().tolist() == [0, 1, 1, 1]

    @pytest.mark.parametrize("shape", [(2, 4, 3, 3), (0, 1, 4, 3, 3), (2, 1, 4, 3, 2)])
    def test_wrong_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(MaskError, match="stack those of the same steps"):
            difference(torch.zeros(2, 1, 4, 3, 3), torch.zeros(shape))


def between_class_variance(values: np.ndarray, threshold: float) -> float:
    above = values > threshold
    if above.all() or not above.any():
        return 0.0
    return float(above.mean() * (~above).mean() * (values[above].mean() - values[~above].mean()) ** 2)


class TestOtsu:
    @settings(deadline=None, max_examples=150)
    @given(
        seed=st.integers(0, 2**32 - 1),
        samples=st.integers(1, 3),
        height=st.integers(1, 24),
        width=st.integers(2, 24),
        kind=st.sampled_from(["uniform", "two classes", "skewed", "few levels"]),
    )
    def test_equals_skimage(self, seed: int, samples: int, height: int, width: int, kind: str) -> None:
        rng = np.random.default_rng(seed)
        values = rng.random((samples, height, width))
        if kind == "two classes":
            values = 0.05 * values + (rng.random(values.shape) < 0.2)
        elif kind == "skewed":
            values = values**6
        elif kind == "few levels":
            values = np.round(values * 4) / 4
        found = otsu_threshold(torch.from_numpy(values))
        for sample, threshold in zip(values, found.tolist(), strict=True):
            expected = threshold_otsu(sample)
            if not np.isclose(threshold, expected, rtol=1e-9, atol=0):
                # Two splits may be equally good but for rounding: either is Otsu's threshold.
                step = (sample.max() - sample.min()) / 256
                binned = np.minimum((sample - sample.min()) // step, 255)
                index = [(t - sample.min()) / step for t in (threshold, expected)]  # centres: a half after the bin
                ours, theirs = (between_class_variance(binned, i) for i in index)
                assert ours == pytest.approx(theirs, rel=1e-9)

    def test_fp32_and_batched(self) -> None:
        rng = np.random.default_rng(3)
        values = np.stack([rng.random((64, 64)) ** power for power in (1, 2, 5)]).astype(np.float32)
        found = otsu_threshold(torch.from_numpy(values))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), [threshold_otsu(sample) for sample in values], rtol=1e-6)

    def test_a_constant_sample_gives_its_constant(self) -> None:
        values = torch.tensor([0.25, 0.0])[:, None, None].expand(2, 4, 4)
        assert otsu_threshold(values).tolist() == [0.25, 0.0]


def cells(*rows: str) -> torch.Tensor:
    """A picture in characters as bool [1, h, w]."""
    return torch.tensor([[character == "#" for character in row] for row in rows])[None]


class TestFindRegion:
    def test_specks_go(self) -> None:
        strength = torch.zeros(1, 20, 20)
        strength[:, 5:9, 5:9] = 0.9
        strength[:, 6, 6] = 1  # the strongest cell lies in the region
        expected = strength > 0
        strength[:, 14, 14] = strength[:, 16, 3] = strength[:, 16, 4] = 0.9
        assert torch.equal(find_region(strength), expected)

    def test_weak_change_counts_where_it_touches_strong_change(self) -> None:
        strength = torch.zeros(1, 24, 24)
        strength[:, 2:20, 2:6] = 1.0
        strength[:, 8:12, 6:8] = 0.25  # Otsu's threshold is between this and the strong cells
        expected = strength > 0
        strength[:, 18:21, 18:21] = 0.25
        assert torch.equal(find_region(strength), expected)

    def test_weak_change_counts_up_to_a_quarter_of_the_picture(self) -> None:
        strength = torch.zeros(1, 8, 32)
        strength[:, :, 0:10] = 1.0
        strength[:, 3:5, 10:30] = 0.25
        found = find_region(strength)
        assert torch.equal(found[:, :, :18], strength[:, :, :18] > 0)
        assert not found[:, :, 18:].any()

    def test_the_strongest_cell_stays_a_lone_speck_though_it_is(self) -> None:
        mask = cells(".....", ".....", "...#.", ".....", ".....")
        assert torch.equal(find_region(mask.float()), mask)

    def test_a_thin_frame_goes_and_what_reaches_the_border_stays(self) -> None:
        strength = torch.zeros(1, 16, 16)
        strength[:, 0] = strength[:, -1] = strength[:, :, 0] = strength[:, :, -1] = 0.9
        region = torch.zeros(1, 16, 16, dtype=torch.bool)
        region[:, 6:11, 0:5] = True
        strength[region] = 1
        found = find_region(strength)
        assert found[region].all()
        # The frame's cells next to the region touch it, so they stay.
        extra = (found & ~region).nonzero()[:, 1:]
        assert len(extra) <= 2
        assert (extra[:, 1] == 0).all()

    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
    def test_always_holds_the_strongest_cell(self, seed: int, height: int, width: int, power: int) -> None:
        strength = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) ** power
        found = find_region(strength)
        assert found.dtype == torch.bool
        assert found.shape == strength.shape
        for sample in range(2):
            y, x = divmod(int(strength[sample].argmax()), width)
            assert found[sample, y, x]

    def test_samples_do_not_touch_each_other(self) -> None:
        strength = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(5)) ** 3
        alone = [find_region(strength[i : i + 1]) for i in range(3)]
        assert torch.equal(find_region(strength), torch.cat(alone))


class TestDifferenceMask:
    def test_finds_the_changed_box_of_each_sample_and_no_more_than_a_cell_around(self) -> None:
        boxes = [(slice(4, 12), slice(6, 14)), (slice(20, 32), slice(0, 5))]
        found = difference_mask(*generations(boxes))
        assert found.dtype == torch.bool
        assert found.shape == (2, 32, 24)
        for sample, (rows, columns) in enumerate(boxes):
            around = torch.zeros(32, 24, dtype=torch.bool)
            around[max(rows.start - 1, 0) : rows.stop + 1, max(columns.start - 1, 0) : columns.stop + 1] = True
            assert found[sample, rows, columns][1:-1, 1:-1].all()
            assert found[sample, rows, columns].float().mean() > 0.95
            assert not found[sample][~around].any()

    def test_holes_close_and_nothing_grows(self) -> None:
        base, edit = generations([(slice(4, 20), slice(6, 18))])
        whole = difference_mask(base, edit)
        for hole in ((8, 9), (8, 13), (9, 13)):
            edit[..., hole[0], hole[1]] = base[..., hole[0], hole[1]]
        assert torch.equal(difference_mask(base, edit), whole)

    def test_a_batch_gives_what_each_sample_gives_alone(self) -> None:
        base, edit = generations([(slice(0, 9), slice(3, 8)), (slice(8, 20), slice(2, 20))])
        alone = [difference_mask(base[:, i : i + 1], edit[:, i : i + 1]) for i in range(2)]
        assert torch.equal(difference_mask(base, edit), torch.cat(alone))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_dtypes_find_the_same_region(self, dtype: torch.dtype) -> None:
        base, edit = generations([(slice(4, 12), slice(6, 14))])
        assert torch.equal(difference_mask(base.to(dtype), edit.to(dtype)), difference_mask(base, edit))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, bad: float) -> None:
        base, edit = generations([(slice(4, 8), slice(4, 8))] * 2)
        edit[1, 1, 2, 3, 3] = bad
        with pytest.raises(MaskError, match="sample 1 hold NaN or infinity"):
            difference_mask(base, edit)

    def test_equal_infinities_do_not_cancel(self) -> None:
        base, edit = generations([(slice(4, 8), slice(4, 8))])
        base[0, 0, 0, 0, 0] = edit[0, 0, 0, 0, 0] = float("inf")
        with pytest.raises(MaskError, match="NaN or infinity"):
            difference_mask(base, edit)

    def test_identical_latents_of_one_sample(self) -> None:
        base, edit = generations([(slice(4, 8), slice(4, 8))] * 2)
        edit[:, 1] = base[:, 1]
        with pytest.raises(MaskError, match=r"same latents for sample 1.*mask of your own"):
            difference_mask(base, edit)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_difference_of_one_rounding_is_none(self, dtype: torch.dtype) -> None:
        base = torch.randn(4, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
        edit = base.clone()
        edit[2] = torch.nextafter(edit[2].float(), torch.tensor(torch.inf)).to(dtype)
        edit[1, :, :, 5, 5] *= 1 + torch.finfo(dtype).eps
        with pytest.raises(MaskError, match="same latents"):
            difference_mask(base, edit)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_roundings_all_over_the_picture_are_none_and_a_small_box_above_them_is_found(
        self, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(4)
        base = torch.randn(10, 1, 4, 64, 64, generator=generator)
        off = 1 + torch.finfo(dtype).eps * torch.randn(base.shape, generator=generator)
        base, edit = base.to(dtype), (base.to(dtype).float() * off).to(dtype)
        with pytest.raises(MaskError, match="same latents"):
            difference_mask(base, edit)
        edit[..., 20:30, 20:30] = (base.float() * (1 + 8 * torch.finfo(dtype).eps)).to(dtype)[..., 20:30, 20:30]
        found = difference_mask(base, edit)
        assert found[:, 20:30, 20:30].all()
        assert found.float().mean() < 0.1

    def test_a_change_of_the_whole_picture_is_returned_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        found = difference_mask(*generations([(slice(0, 32), slice(0, 23)), (slice(4, 8), slice(4, 8))]))
        assert "changes 96% of sample 0" in caplog.text
        assert found[0, :, :23].all()
        assert found[1].float().mean() < 0.1

    def test_the_same_change_in_every_cell_is_the_whole_picture(self, caplog: pytest.LogCaptureFixture) -> None:
        base = torch.zeros(2, 1, 4, 8, 8)
        assert difference_mask(base, base + 1).all()
        assert "changes 100%" in caplog.text

    def test_no_warning_for_a_part(self, caplog: pytest.LogCaptureFixture) -> None:
        difference_mask(*generations([(slice(4, 24), slice(6, 20))]))
        assert not caplog.records

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
    @example(seed=0, height=1, width=1)
    def test_any_latents_give_at_least_one_cell(self, seed: int, height: int, width: int) -> None:
        base, edit = torch.randn(2, 2, 3, 4, height, width, generator=torch.Generator().manual_seed(seed))
        assert difference_mask(base, edit).flatten(1).any(dim=1).all()
