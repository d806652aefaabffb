import pytest
import torch

from data.schemas import InputError
from evaluation.semantic_ids import (
    category_prefixes,
    nearest_by_features,
    neighbour_agreement,
    prefix_numbers,
    prefix_purity,
    purity_by_depth,
    shared_prefix_lengths,
)

CODES = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [2, 0], [0, 1]])
CATEGORIES = ["a", "a", "b", "b", "b", "a", ""]


def test_purity_by_hand():
    """Prefix 0 holds a, a, b: shares 1/2, 1/2, 0. Prefix 1 holds b, b: 1, 1. Prefix 2 is alone, "" is left out."""
    purity = prefix_purity(CODES, CATEGORIES, 1)
    assert purity.share == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    assert (purity.depth, purity.num_items, purity.num_prefixes) == (1, 5, 2)
    # Of the 15 pairs of the six items with a category, 3 + 3 are of one category.
    assert purity.chance == pytest.approx(6 / 15)


def test_singletons_do_not_count():
    purity = prefix_purity(CODES, CATEGORIES, 2)
    assert (purity.share, purity.num_items, purity.num_prefixes) == (1.0, 4, 2)
    alone = prefix_purity(torch.tensor([[0, 0], [0, 1]]), ["a", "a"], 2)
    assert (alone.share, alone.num_items, alone.num_prefixes, alone.chance) == (None, 0, 0, 1.0)


def test_ids_that_know_nothing_have_the_purity_of_chance():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(5, (4000, 3), generator=generator)
    categories = [str(int(number) ** 2 // 20) for number in torch.randint(10, (4000,), generator=generator)]
    for purity in purity_by_depth(codes, categories):
        assert purity.share == pytest.approx(purity.chance, abs=0.015)
    assert purity_by_depth(codes, categories)[0].chance > 0.2


def test_purity_does_not_depend_on_the_order_of_items():
    order = torch.tensor([6, 2, 0, 5, 3, 1, 4])
    shuffled = [CATEGORIES[row] for row in order]
    for depth in (1, 2):
        assert prefix_purity(CODES[order], shuffled, depth) == prefix_purity(CODES, CATEGORIES, depth)


def test_purity_without_categories_or_with_one_item():
    nothing = prefix_purity(CODES, [""] * 7, 1)
    assert (nothing.share, nothing.num_items, nothing.chance) == (None, 0, None)
    one = prefix_purity(torch.tensor([[3, 1]]), ["a"], 2)
    assert (one.share, one.num_items, one.chance) == (None, 0, None)


def test_purity_of_bad_input():
    with pytest.raises(InputError, match=r"expected codes of shape \[N, L\] for 2 categories, got \[7, 2\]"):
        prefix_purity(CODES, ["a", "b"], 1)
    for depth in (0, 3):
        with pytest.raises(InputError, match=rf"depth of 1 to 2 codes, got {depth}"):
            prefix_purity(CODES, CATEGORIES, depth)


def test_category_prefixes():
    paths = ["Beauty > Makeup > Nails", "Beauty", "", "A > B"]
    assert category_prefixes(paths, 2) == ["Beauty > Makeup", "Beauty", "", "A > B"]
    assert category_prefixes(paths, 1) == ["Beauty", "Beauty", "", "A"]


def test_prefix_numbers_follow_the_order_of_prefixes():
    assert prefix_numbers(CODES, 2).tolist() == [0, 0, 1, 2, 2, 3, 1]
    assert prefix_numbers(CODES, 1).tolist() == [0, 0, 0, 1, 1, 2, 0]
    assert prefix_numbers(CODES, 0).tolist() == [0] * 7
    assert prefix_numbers(CODES[:0], 2).tolist() == []


def test_prefix_numbers_of_many_levels_do_not_overflow():
    codes = torch.randint(65536, (50, 8), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    assert prefix_numbers(codes, 8).tolist() == (torch.unique(codes, dim=0, return_inverse=True)[1].tolist())


def test_shared_prefix_lengths():
    codes = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 3], [0, 2, 3]])
    assert shared_prefix_lengths(codes, codes[:1]).tolist() == [[3, 2, 1, 0]]


def test_nearest_by_features_leaves_out_the_row_itself():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    rows, cosines = nearest_by_features(features, torch.tensor([0, 3]), 2)
    assert rows.tolist() == [[1, 2], [4, 2]]
    torch.testing.assert_close(cosines, torch.tensor([[1.0, 0.5**0.5], [0.0, -(0.5**0.5)]]))


def test_nearest_by_features_is_the_same_in_blocks(monkeypatch):
    features = torch.randn(63, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 17, 62])
    whole = nearest_by_features(features, rows, 7)
    monkeypatch.setattr("evaluation.semantic_ids._BLOCK_ROWS", 4)
    found, cosines = nearest_by_features(features, rows, 7)
    assert found.tolist() == whole[0].tolist()
    torch.testing.assert_close(cosines, whole[1])


def test_nearest_of_too_few_rows():
    with pytest.raises(InputError, match=r"k of 1 to 2 \(N - 1\), got 3"):
        nearest_by_features(torch.eye(3), torch.tensor([0]), 3)


def test_agreement_by_hand():
    """Items in two directions, and ids that tell one of them apart."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.03], [0.0, 1.0], [0.01, 1.0]])
    codes = torch.tensor([[0, 0], [0, 0], [1, 0], [2, 0], [2, 1]])
    agreement = neighbour_agreement(features, codes, num_neighbours=1)
    # Neighbours: 0 -> 1, 1 -> 0, 2 -> 1, 3 -> 4, 4 -> 3.
    assert (agreement.num_neighbours, agreement.num_sampled) == (1, 5)
    assert agreement.by_depth == pytest.approx((4 / 5, 2 / 5))
    # The list of item 2 holds each of the four others with probability 1 / 4.
    assert agreement.overlap == pytest.approx((1 + 1 + 1 / 4 + 1 + 1) / 5)
    assert agreement.chance_by_depth == pytest.approx((4 / 20, 2 / 20))
    assert agreement.overlap_chance == 1 / 4


def test_ties_between_prefixes_count_as_their_expectation():
    """No two items share a code: any two of the three others may be listed."""
    agreement = neighbour_agreement(torch.eye(4), torch.arange(4)[:, None], num_neighbours=2)
    assert agreement.overlap == pytest.approx(2 / 3)
    assert agreement.overlap_chance == pytest.approx(2 / 3)
    assert agreement.by_depth == (0.0,)
    # Three items share a code: of the two others there, one place is left for each with probability 1 / 2.
    shared = neighbour_agreement(torch.eye(3), torch.zeros(3, 1, dtype=torch.int64), num_neighbours=1)
    assert shared.overlap == pytest.approx(1 / 2)
    assert shared.by_depth == (1.0,)


def test_ids_made_of_the_features_agree_and_shuffled_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 16, generator=generator)
    groups = torch.arange(400) % 20
    features = centres[groups] + 0.05 * torch.randn(400, 16, generator=generator)
    codes = torch.stack([groups, torch.arange(400) // 200], dim=1)
    made = neighbour_agreement(features, codes, num_neighbours=10, num_sampled=100)
    shuffled = neighbour_agreement(
        features, codes[torch.randperm(400, generator=generator)], num_neighbours=10, num_sampled=100
    )
    assert made.by_depth[0] == 1.0
    assert made.overlap > 0.4
    assert shuffled.by_depth[0] == pytest.approx(shuffled.chance_by_depth[0], abs=0.05)
    assert shuffled.overlap == pytest.approx(shuffled.overlap_chance, abs=0.05)


def test_agreement_of_few_items():
    agreement = neighbour_agreement(torch.eye(2), torch.zeros(2, 1, dtype=torch.int64), num_neighbours=10)
    assert (agreement.num_neighbours, agreement.overlap) == (1, 1.0)
    with pytest.raises(InputError, match="at least 2 items, got 1"):
        neighbour_agreement(torch.eye(1), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="for 2 features"):
        neighbour_agreement(torch.eye(2), torch.zeros(3, 1, dtype=torch.int64))
