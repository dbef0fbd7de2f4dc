"""Figures of masks, pictures and verdicts, on inputs whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fisedit_compile.quality.cases import Item, load_cases
from fisedit_compile.quality.control_choice import JudgedDense, choose_control, score_control
from fisedit_compile.quality.frechet import frechet_distance
from fisedit_compile.quality.judge import Sight
from fisedit_compile.quality.regions import changed_cells, enlarge, score_mask
from fisedit_compile.quality.similarity import as_pixels, psnr_inside, seam_excess, ssim_inside
from fisedit_compile.quality.verdicts import judge_edit, shows


def box(top: int, bottom: int, left: int, right: int, size: int = 16) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def noise(seed: int, size: int = 32) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestRegions:
    def test_cells_that_differ_enough_and_have_company_have_changed(self) -> None:
        base = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
        edit = base.clone()
        edit[:, 4:8, 4:8] += 1.0
        edit[:, 12, 12] += 1.0  # a speck
        edit[:, :2] += 0.2  # drift
        assert torch.equal(changed_cells(base, edit), box(4, 8, 4, 8))
        assert torch.equal(changed_cells(10 * base, 10 * edit), box(4, 8, 4, 8))
        assert not changed_cells(base, base).any()

    def test_a_mask_is_scored_against_the_region(self) -> None:
        scores = score_mask(box(0, 4, 0, 8), box(0, 4, 4, 8))
        assert scores is not None
        assert (scores.iou, scores.recall, scores.precision) == (0.5, 1.0, 0.5)
        assert (scores.area, scores.area_ratio) == (32 / 256, 2.0)
        missed = score_mask(box(8, 12, 0, 4), box(0, 4, 4, 8))
        assert missed is not None
        assert (missed.iou, missed.recall, missed.precision, missed.area_ratio) == (0, 0, 0, 1)
        assert score_mask(box(0, 4, 0, 4), box(0, 0, 0, 0)) is None

    def test_a_mask_is_enlarged_by_whole_cells(self) -> None:
        assert torch.equal(enlarge(box(1, 2, 1, 2), (64, 64)), box(4, 8, 4, 8, size=64))


class TestSimilarity:
    def test_psnr_is_that_of_the_pixels_inside(self) -> None:
        first, second, inside = noise(0), noise(1), box(4, 20, 4, 20, size=32)
        crops = [each[:, 4:20, 4:20].numpy() for each in (first, second)]
        assert psnr_inside(first, second, inside) == pytest.approx(peak_signal_noise_ratio(*crops, data_range=1.0))
        second[:, ~inside] = 0
        assert psnr_inside(first, second, inside) == pytest.approx(peak_signal_noise_ratio(*crops, data_range=1.0))
        assert psnr_inside(first, first, inside) == pytest.approx(20 * np.log10(510))

    def test_ssim_is_the_mean_of_the_windows_inside(self) -> None:
        first, second = noise(0), (noise(0) + noise(1)) / 2
        inside = box(10, 20, 10, 20, size=32)
        _, windows = structural_similarity(
            first.numpy(),
            second.numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        assert ssim_inside(first, second, inside) == pytest.approx(windows[:, 10:20, 10:20].mean(), abs=1e-3)
        assert ssim_inside(first, first, inside) == pytest.approx(1.0)

    def test_a_seam_is_found_at_the_border_and_a_little_further_out(self) -> None:
        smooth = torch.full((3, 32, 32), 0.5, dtype=torch.float64)
        inside = box(8, 24, 8, 24, size=32)
        assert seam_excess(smooth, smooth, inside, 4) == 0
        for grown in (0, 3):
            pasted = smooth.clone()
            pasted[:, box(8 - grown, 24 + grown, 8 - grown, 24 + grown, size=32)] += 0.1
            assert seam_excess(pasted, smooth, inside, 4) == pytest.approx(25.5)
            assert seam_excess(pasted, pasted, inside, 4) == pytest.approx(0)
        assert seam_excess(pasted, smooth, inside, 2) == pytest.approx(0)

    def test_a_mask_of_everything_has_no_border(self) -> None:
        assert seam_excess(noise(0), noise(1), torch.ones(32, 32, dtype=torch.bool), 3) == 0

    def test_pictures_become_pixels(self) -> None:
        assert as_pixels(Image.new("RGB", (8, 6), (255, 0, 51)))[:, 0, 0].tolist() == [1, 0, 0.2]


class TestFrechetDistance:
    FEATURES = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def test_of_a_moved_set_it_is_the_square_of_the_way(self) -> None:
        moved = self.FEATURES + torch.tensor([3.0, 0, 0, 4, 0])
        assert frechet_distance(self.FEATURES, moved) == pytest.approx(25)
        assert frechet_distance(self.FEATURES, self.FEATURES) == pytest.approx(0, abs=1e-9)

    def test_of_a_scaled_set_it_is_what_the_deviations_differ_by(self) -> None:
        centred = self.FEATURES - self.FEATURES.mean(0)
        total_variance = float(centred.square().sum() / 59)
        assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * total_variance)

    def test_one_picture_has_no_distribution(self) -> None:
        assert frechet_distance(self.FEATURES[:1], self.FEATURES) is None


class TestVerdicts:
    CASE = next(case for case in load_cases() if case.kind == "added")

    def sight(self, **changes: Item) -> Sight:
        return Sight({**self.CASE.after.items, **changes}, self.CASE.after.background)

    def test_the_new_thing_at_its_place_is_a_success(self) -> None:
        case = self.CASE
        before = Sight(case.before.items, case.before.background)
        assert shows(before, case.before, case.changed)
        assert not shows(self.sight(), case.before, case.changed)
        assert judge_edit(before, self.sight(), case).right
        assert not judge_edit(before, before, case).success

    def test_the_new_thing_on_another_object_is_wrong(self) -> None:
        case = self.CASE
        (other,) = set(case.before.items) - {case.changed}
        before = Sight(case.before.items, case.before.background)
        hatted = Item(before.items[other].name, before.items[other].colour, "wig", before.items[other].size)
        verdict = judge_edit(before, self.sight(**{other: hatted}), case)
        assert verdict.success
        assert verdict.wrong
        assert not verdict.right
        seen_otherwise = Sight({**before.items, other: hatted}, before.background)
        assert judge_edit(seen_otherwise, self.sight(**{other: hatted}), case).right

    def test_another_background_is_all_that_may_change_of_a_background(self) -> None:
        case = next(case for case in load_cases() if case.kind == "background")
        before = Sight(case.before.items, case.before.background)
        assert judge_edit(before, Sight(case.after.items, case.after.background), case).right
        assert not judge_edit(before, before, case).success
        swapped = dict(zip(case.after.items, reversed(case.after.items.values()), strict=True))
        assert judge_edit(before, Sight(swapped, case.after.background), case).wrong


def test_the_best_control_changes_the_right_thing_most_often_and_then_the_least() -> None:
    def scored(control: float, *edits: tuple[bool, bool, float]) -> object:
        return score_control(control, [JudgedDense(*each) for each in edits])

    free = scored(0.0, (True, True, 0.5), (True, False, 0.5))
    middle = scored(0.4, (True, False, 0.7), (True, False, 0.7))
    long = scored(0.6, (True, False, 0.8), (True, False, 0.8))
    frozen = scored(1.0, (False, False, 0.99), (True, False, 0.99))
    assert (free.success, free.wrong, free.right, free.ssim_to_base) == (1, 0.5, 0.5, 0.5)
    assert choose_control([free, middle, long, frozen]) == 0.6
    assert choose_control([free, frozen]) == 1.0
