"""Where the words stood that an edit takes away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisedit_compile.masks.grown import grown
from fisedit_compile.masks.old_words import attention_to, with_hidden_changes, with_old_words, words_of_changes


def box(rows: slice, columns: slice, size: tuple[int, int] = (16, 12)) -> Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, rows, columns] = True
    return mask


def attended(where: Tensor) -> Tensor:
    """Attention that is strong in a region, if not the same everywhere, and weak elsewhere: of one change."""
    return ((0.7 + 0.2 * torch.rand(where.shape, generator=torch.Generator().manual_seed(0))) * where)[:, None]


class TestAttentionTo:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_is_the_mean_over_heads_of_the_sum_over_the_words(self, dtype: torch.dtype) -> None:
        maps = torch.rand(2 * 16 * 12, 3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        words = words_of_changes([[[1, 3, 5, 6], [0]], [[4]]], tokens=7)  # the last two tokens have no maps
        found = attention_to(words, [maps], (16, 12))
        of_samples = maps.double().view(2, 16, 12, 3, 5)
        expected = torch.stack(
            [
                torch.stack([of_samples[0, ..., [1, 3]].sum(-1).mean(-1), of_samples[0, ..., 0].mean(-1)]),
                torch.stack([of_samples[1, ..., 4].mean(-1), torch.zeros(16, 12)]),
            ]
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 if dtype is torch.float16 else 1e-6)

    def test_each_level_counts_once_and_lies_where_it_belongs(self) -> None:
        """The U-Net's levels are halved with a rest of one, as its convolutions halve odd sizes."""
        size, words = (9, 6), torch.tensor([[[True]]])
        fine = torch.zeros(1, 9, 6)
        fine[:, :4] = 1
        coarse = torch.zeros(1, 5, 3)
        coarse[:, :, :1] = 1
        maps = [fine.view(-1, 1, 1), fine.view(-1, 1, 1), coarse.view(-1, 1, 1)]
        found = attention_to(words, maps, size)[0, 0]
        assert found[0, 0] == 1
        assert found[0, -1] == found[-1, 0] == 0.5
        assert found[-1, -1] == 0

    def test_maps_of_other_sizes_and_of_no_words_say_nothing(self) -> None:
        words = words_of_changes([[[]], [[0]]], tokens=2)
        maps = [torch.ones(2 * 7, 1, 2), torch.ones(2 * 16, 1, 2)]
        found = attention_to(words, maps, (4, 4))
        assert torch.equal(found, torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 4, 4))
        assert torch.equal(attention_to(words, [], (4, 4)), torch.zeros(2, 1, 4, 4))


class TestWithOldWords:
    def test_a_background_of_which_half_was_found_is_taken_whole(self) -> None:
        background = ~box(slice(5, 9), slice(3, 7))
        found = background & box(slice(0, 8), slice(0, 12))
        assert torch.equal(with_old_words(found, attended(background)), background)

    def test_a_thing_that_loses_a_part_keeps_the_rest(self) -> None:
        found = box(slice(2, 4), slice(3, 7))
        assert torch.equal(with_old_words(found, attended(box(slice(2, 10), slice(3, 7)))), found)

    def test_what_was_found_beyond_the_old_words_stays(self) -> None:
        found, stood = box(slice(2, 8), slice(3, 9)), box(slice(3, 9), slice(3, 8))
        joined = with_old_words(found, attended(stood))
        assert torch.equal(joined & (found | stood), found | stood)
        assert joined.sum() <= (found | stood).sum() + 2  # a hole that was closed

    def test_samples_stand_alone_and_one_without_removed_words_stays(self) -> None:
        background = ~box(slice(5, 9), slice(3, 7))
        half = background & box(slice(0, 8), slice(0, 12))
        found = torch.cat([half, half])
        attention = torch.cat([torch.zeros(1, 1, 16, 12), attended(background)])
        assert torch.equal(with_old_words(found, attention), torch.cat([half, background]))


class TestWithHiddenChanges:
    THING, OTHER = box(slice(5, 9), slice(3, 7)), box(slice(10, 13), slice(8, 11))

    def strength(self, background: float) -> Tensor:
        """The thing changes strongly, the background less, and the other thing hardly."""
        return torch.where(self.THING, 1.0, torch.where(self.OTHER, 0.01, background))

    def test_a_background_is_taken_up_to_what_stays(self) -> None:
        seen = ~(self.THING | self.OTHER) & box(slice(0, 12), slice(0, 12))  # its words, as attention has it
        attention = torch.cat([attended(self.THING), attended(seen)], 1)
        strength, several = self.strength(0.2), torch.tensor([True])
        assert torch.equal(with_old_words(self.THING, attention), self.THING)
        assert torch.equal(with_hidden_changes(self.THING, attention, several, strength), ~self.OTHER)

    def test_a_thing_is_taken_where_it_stood_and_where_the_new_one_is_larger(self) -> None:
        background = ~(self.THING | self.OTHER)
        larger = grown(self.OTHER)
        strength = torch.where(background, 1.0, 0.0) + 0.2 * larger * ~background
        attention = torch.cat([attended(self.OTHER), attended(background)], 1)
        taken = with_hidden_changes(background, attention, torch.tensor([True]), strength)
        assert torch.equal(taken, ~self.THING)

    def test_samples_of_one_change_stay_and_each_stands_alone(self) -> None:
        found, nothing = self.THING.expand(3, -1, -1), torch.zeros(1, 1, 16, 12)
        both = torch.cat([attended(self.THING), attended(~self.THING & ~self.OTHER)], 1)
        attention = torch.cat([both, both, torch.cat([nothing, both[:, 1:]], 1)])  # the last one adds the thing
        strength = self.strength(0.2).expand(3, -1, -1)
        taken = with_hidden_changes(found, attention, torch.tensor([True, False, True]), strength)
        assert torch.equal(taken, torch.cat([~self.OTHER, self.THING, ~self.OTHER]))

    def test_what_was_found_of_all_changes_is_all(self) -> None:
        attention = torch.cat([attended(self.THING), attended(self.OTHER)], 1)
        found = self.THING | self.OTHER
        assert torch.equal(with_hidden_changes(found, attention, torch.tensor([True]), self.strength(0.0)), found)


class TestWordsOfChanges:
    def test_samples_have_different_numbers_of_changes(self) -> None:
        words = words_of_changes([[[1, 2], [4]], [], [[0]], [[]]], tokens=5)
        assert words.shape == (4, 2, 5)
        assert words.nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 4], [2, 0, 0]]

    def test_no_changes_at_all(self) -> None:
        assert words_of_changes([[], []], tokens=5).shape == (2, 0, 5)
