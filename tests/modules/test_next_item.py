from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import NO_TARGET, InputError, SeqBatch
from modules.sequential.next_item import NextItemConfig, NextItemModel, next_items, positions_in_rows

BATCH = replace(SeqBatch.from_lists([[1, 2, 3], [], [4], []]), targets=torch.tensor([7, NO_TARGET, 8, NO_TARGET]))


class SumOfItems(NextItemModel):
    """Reads an item as twice its vector."""

    name = "sum"

    def encode(self, batch: SeqBatch) -> Tensor:
        return self.look_up(batch) * 2.0


@dataclass(frozen=True, kw_only=True)
class SumConfig(NextItemConfig):
    def build(self) -> SumOfItems:
        return SumOfItems(self, num_dropouts=0)


def model(**changes: int) -> SumOfItems:
    torch.manual_seed(0)
    return SumConfig(**{"num_items": 10, "d_model": 4, "max_history": 3, **changes}).build()


def test_next_items_follow_within_a_row_and_the_target_follows_the_last():
    assert next_items(BATCH).tolist() == [2, 3, 7, 8]
    assert next_items(replace(BATCH, targets=None)).tolist() == [2, 3, NO_TARGET, NO_TARGET]
    one_row_without = replace(BATCH, targets=torch.tensor([NO_TARGET, NO_TARGET, 8, NO_TARGET]))
    assert next_items(one_row_without).tolist() == [2, 3, NO_TARGET, 8]
    assert next_items(SeqBatch.from_lists([[], []])).tolist() == []


def test_the_tail_of_a_batch_of_fixed_capacity_has_no_next_items():
    filled = BATCH.to_capacity(num_rows=6, num_items=7)
    assert next_items(filled).tolist() == [2, 3, 7, 8, *[NO_TARGET] * 3]
    assert positions_in_rows(filled).tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert positions_in_rows(SeqBatch.from_lists([[], [5, 6], [7]])).tolist() == [0, 1, 0]


def test_the_loss_is_the_cross_entropy_of_every_next_item_over_the_catalogue():
    sums = model()
    states = sums.items[[1, 2, 3, 4]] * 4.0  # twice the square root of the width
    expected = F.cross_entropy(states @ sums.items.T, torch.tensor([2, 3, 7, 8]))
    torch.testing.assert_close(sums(BATCH)["loss"], expected)


def test_a_fixed_capacity_changes_neither_loss_nor_gradients():
    sums = model()
    exact, filled = sums(BATCH)["loss"], sums(BATCH.to_capacity(num_rows=5, num_items=9))["loss"]
    torch.testing.assert_close(filled, exact)
    (expected,), (gradient,) = (torch.autograd.grad(loss, [sums.items]) for loss in (exact, filled))
    torch.testing.assert_close(gradient, expected)


def test_queries_are_the_last_states_and_zeros_of_empty_rows():
    sums = model()
    queries = sums.queries(BATCH.to_capacity(num_rows=5, num_items=6))
    torch.testing.assert_close(queries[[0, 2]], sums.items[[3, 4]] * 4.0)
    assert queries[[1, 3, 4]].abs().max() == 0
    assert sums.queries(SeqBatch.from_lists([[]])).tolist() == [[0.0] * 4]
    assert sums.queries(SeqBatch.from_lists([])).shape == (0, 4)
    assert sums.item_vectors() is sums.items


def test_batches_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match="at most max_history = 2 items, got 3"):
        model(max_history=2)(BATCH)
    with pytest.raises(ValueError, match="codes"):
        model(num_items=4).queries(BATCH)


def test_a_config_survives_json_and_refuses_what_it_does_not_know():
    config = SumConfig(num_items=5, dropout=0.25)
    assert SumConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="SumConfig does not know heads; valid names: num_items, d_model"):
        SumConfig.from_dict({"heads": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": -1}, "SumConfig expected num_items of at least 0, got -1"),
        ({"max_history": 0}, "SumConfig expected max_history of at least 1, got 0"),
        ({"dropout": 1.0}, r"SumConfig expected dropout in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        SumConfig(**change)


def test_a_model_needs_the_number_of_items():
    with pytest.raises(InputError, match="SumOfItems expected num_items of at least 1, got 0"):
        model(num_items=0)
