import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

import modules.dense.projected_items as projected_module
from data.schemas import InputError
from modules.dense.projected_items import ProjectedItems
from tests.modules.tiny_artifact import tiny_model
from tests.modules.tiny_liger import LEVEL_SIZES, NUM_FEATURES, item_table, liger_model


def counting(model):
    """A mock in the place of `project_items` that passes calls on."""
    return mock.patch.object(model, "project_items", wraps=model.project_items)


def rows_of(calls):
    return sum(len(call.args[0]) for call in calls.call_args_list)


def test_the_catalogue_is_projected_once_in_blocks():
    model, items = liger_model(), item_table()
    with mock.patch.object(projected_module, "_BLOCK_ITEMS", 7), counting(model) as calls:
        projected = ProjectedItems(model, items)
        vectors = projected.vectors()
        assert (calls.call_count, rows_of(calls)) == (6, 40)
        assert projected.vectors() is vectors
        torch.testing.assert_close(projected.unit(), torch.nn.functional.normalize(vectors))
        assert projected.unit() is projected.unit()
        assert calls.call_count == 6
    torch.testing.assert_close(vectors, model.project_items(items).detach())
    assert not vectors.requires_grad
    assert len(projected) == 40


def optimizer_step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.project_items(item_table()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def averages_copied_in(model):
    weights = list(model.parameters())
    with torch.no_grad():
        torch._foreach_copy_(weights, [weight * 0.5 + 0.1 for weight in weights])


def best_weights_loaded(model):
    model.load_state_dict(liger_model(seed=1).state_dict())


def features_fitted(model):
    model.fit_features_(item_table(seed=5))


def replayed_step(model):
    """As a CUDA graph does: PyTorch does not count the change, but training mode was on."""
    model.train()
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    model.eval()


CHANGES = [optimizer_step, averages_copied_in, best_weights_loaded, features_fitted, replayed_step]


@pytest.mark.parametrize("change", CHANGES)
def test_vectors_follow_the_weights_in_one_place_of_memory(change):
    model, items = liger_model(), item_table()
    projected = ProjectedItems(model, items)
    vectors, unit = projected.vectors(), projected.unit().clone()
    before = vectors.clone()
    change(model)
    assert projected.vectors() is vectors
    assert not torch.allclose(vectors, before)
    fresh = ProjectedItems(model, items)
    assert torch.equal(vectors, fresh.vectors())
    assert torch.equal(projected.unit(), fresh.unit())
    assert not torch.allclose(projected.unit(), unit)


def test_what_inference_mode_made_goes_on_outside_of_it():
    model, items = liger_model(), item_table()
    with torch.inference_mode():
        born_there = liger_model()
        projected = ProjectedItems(model, items)
        before = projected.vectors().clone()
        torch.testing.assert_close(ProjectedItems(born_there, items).vectors(), before)
    averages_copied_in(model)
    assert not torch.equal(projected.vectors(), before)


def test_dropout_and_autocast_are_off_and_training_mode_comes_back():
    model, items = liger_model(), item_table()
    projected = ProjectedItems(model, items)
    expected = projected.vectors().clone()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projected.vectors(), expected)
    assert model.training


@pytest.mark.parametrize("is_read", [False, True])
def test_a_refresh_projects_what_is_new_or_changed(is_read):
    model, items = liger_model(), item_table()
    projected = ProjectedItems(model, items)
    before = projected.vectors() if is_read else None
    # Two new items; item 7 gets other features, and items 4 and 13, which had none, their first ones, 13 zeros.
    grown = items.with_rows(torch.tensor([7, 4, 13, 40, 41]), torch.randn(5, NUM_FEATURES))
    grown.features[13] = 0
    with mock.patch.object(projected_module, "_BLOCK_ITEMS", 16), counting(model) as calls:
        projected.refresh(grown)
        projected.refresh(grown)
        vectors = projected.vectors()
        assert rows_of(calls) == (5 if is_read else 42)
    torch.testing.assert_close(vectors, ProjectedItems(model, grown).vectors())
    torch.testing.assert_close(projected.unit(), torch.nn.functional.normalize(vectors))
    assert projected.cold.tolist() == [*items.cold.tolist(), True, True]
    if before is not None:
        kept = [row for row in range(40) if row not in (4, 7, 13)]
        assert torch.equal(vectors[kept], before[kept])


def test_a_refresh_after_training_is_right_everywhere():
    model, items = liger_model(), item_table()
    projected = ProjectedItems(model, items)
    projected.vectors()
    averages_copied_in(model)
    grown = items.with_rows(torch.tensor([40]), torch.randn(1, NUM_FEATURES))
    projected.refresh(grown)
    assert torch.equal(projected.vectors(), ProjectedItems(model, grown).vectors())


def test_a_table_of_which_only_the_flags_have_changed_is_not_projected_again():
    model, items = liger_model(), item_table()
    projected = ProjectedItems(model, items)
    before = projected.vectors().clone()
    with counting(model) as calls:
        projected.refresh(replace(items, cold=~items.cold))
        assert torch.equal(projected.vectors(), before)
        assert rows_of(calls) == 0
    assert torch.equal(projected.cold, ~items.cold)


def test_copies_of_a_model_have_projections_of_their_own():
    model, items = liger_model(), item_table()
    other = copy.deepcopy(model)
    averages_copied_in(other)
    assert not torch.equal(ProjectedItems(model, items).vectors(), ProjectedItems(other, items).vectors())


def test_items_that_do_not_fit_are_refused():
    model, items = liger_model(), item_table()
    narrow = replace(items, features=items.features[:, :4])
    projected = ProjectedItems(model, items)
    with pytest.raises(InputError, match="features of width 6, got 4"):
        ProjectedItems(model, narrow)
    with pytest.raises(InputError, match="features of width 6, got 4"):
        projected.refresh(narrow)
    assert projected.vectors().shape == (40, 16)
    with pytest.raises(InputError, match="reads no item features"):
        ProjectedItems(tiny_model(LEVEL_SIZES), items)
    with pytest.raises(InputError, match="reads item features, got no items"):
        ProjectedItems.of(model, None)
    with pytest.raises(InputError, match=r"features of all 41 items .* got 40 rows"):
        projected.check_rows(41)
    assert ProjectedItems.of(model, projected) is projected
