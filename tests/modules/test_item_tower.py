from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import InputError
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig, ItemTower

CONFIG = ItemInputConfig(num_features=3, hidden_dims=(8, 5), projection_dropout=0.5)


def table(features: list[list[float]], missing: list[int] = [], cold: list[int] = []) -> ItemTable:  # noqa: B006
    flags = torch.zeros(2, len(features), dtype=torch.bool)
    flags[0, missing], flags[1, cold] = True, True
    return ItemTable(torch.tensor(features), flags[0], flags[1])


def small_tower(seed: int = 0) -> ItemTower:
    """In evaluation mode, with a last layer as after training."""
    torch.manual_seed(seed)
    tower = ItemTower(CONFIG, d_model=4)
    torch.nn.init.normal_(tower.projection.linears[-1].weight)
    return tower.eval()


def by_hand(tower: ItemTower, standardised: Tensor) -> Tensor:
    first, second, third = tower.projection.linears
    hidden = torch.relu(second(torch.relu(first(standardised))))
    return tower.projection.skip(standardised) + third(hidden)


def test_warm_items_with_features_decide_how_features_are_standardised() -> None:
    tower = small_tower()
    features = [[1.0, 5.0, 0.1], [3.0, 5.000001, 0.1], [99.0, 7.0, 3.1], [0.0, 0.0, 0.0], [2.0, 5.0, 0.1]]
    items = table(features, missing=[3], cold=[2])
    tower.fit_(items)
    torch.testing.assert_close(tower.feature_mean, torch.tensor([2.0, 5.0, 0.1]))
    # The first deviates by (2 / 3) ** 0.5; the others are constant but for rounding.
    torch.testing.assert_close(tower.feature_scale, torch.tensor([1.5**0.5, 1.0, 1.0]))
    standardised = torch.tensor([[-(1.5**0.5), 0.0, 0.0], [97 * 1.5**0.5, 2.0, 3.0]])
    torch.testing.assert_close(tower(items.features, items.missing)[[0, 2]], by_hand(tower, standardised))
    assert {"feature_mean", "feature_scale"} <= set(tower.state_dict())


def test_standardisation_is_exact_far_from_zero() -> None:
    tower = ItemTower(replace(CONFIG, hidden_dims=()), d_model=3).eval()
    features = 100 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    tower.fit_(ItemTable(features, torch.zeros(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)))
    exact = features.double()
    exact = (exact - exact.mean(0)) / exact.std(0, correction=0)
    expected = F.linear(exact, tower.projection.skip.weight.double(), tower.projection.skip.bias.double())
    got = tower(features, torch.zeros(50, dtype=torch.bool))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_projection_begins_as_a_linear_map_of_the_features_scale() -> None:
    torch.manual_seed(0)
    tower = ItemTower(ItemInputConfig(num_features=64, hidden_dims=(32,)), d_model=48)
    features = torch.randn(2000, 64)
    projected = tower(features, torch.zeros(2000, dtype=torch.bool))
    torch.testing.assert_close(projected, tower.projection.skip(features))
    assert projected.std().item() == pytest.approx(1.0, abs=0.1)


def test_a_learned_vector_stands_for_missing_features() -> None:
    tower = small_tower()
    features = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.0, 0.0, 0.0]])
    projected = tower(features, torch.tensor([False, True, True]))
    torch.testing.assert_close(projected[0], by_hand(tower, features)[0])
    torch.testing.assert_close(projected[1:], tower.missing.expand(2, -1))
    (gradient,) = torch.autograd.grad(projected.sum(), [tower.missing])
    torch.testing.assert_close(gradient, torch.full((4,), 2.0))


def test_dropout_is_on_hidden_layers_in_training_alone() -> None:
    tower, missing = small_tower(), torch.zeros(4000, dtype=torch.bool)
    features = torch.tensor([[1.0, -2.0, 0.5]]).expand(4000, -1)
    exact = tower(features, missing)
    torch.testing.assert_close(exact[0], by_hand(tower, features[:1])[0])
    assert torch.equal(exact, tower(features, missing))
    with torch.no_grad():  # a positive weight lets the hidden layers' ReLU do nothing but what dropout leaves
        for linear in tower.projection.linears:
            linear.weight.abs_()
    positive = features.abs()
    dropped = tower.train()(positive, missing)
    assert dropped.std(dim=0).min() > 0.1
    torch.testing.assert_close(dropped.mean(0), by_hand(tower, positive[:1])[0], rtol=0.1, atol=0.1)


def test_the_key_changes_with_what_the_projection_reads() -> None:
    tower = small_tower()
    keys = [tower.state_key()]
    assert tower.state_key() == keys[0]
    with torch.no_grad():
        for tensor in (*tower.parameters(), *tower.buffers()):
            tensor.add_(1.0)
            keys.append(tower.state_key())
    assert len(set(keys)) == len(keys)


def test_wrong_features_are_named() -> None:
    tower = small_tower()
    wrong = table([[1.0, 2.0]])
    for read in (lambda: tower(wrong.features, wrong.missing), lambda: tower.fit_(wrong)):
        with pytest.raises(InputError, match=r"expected item features \[N, 3\], got \[1, 2\]"):
            read()
    with pytest.raises(InputError, match="got 2 items, 1 without features and 1 cold"):
        tower.fit_(table([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], missing=[1], cold=[0]))
    with pytest.raises(InputError, match="num_features of at least 1, got 0"):
        ItemTower(ItemInputConfig(), d_model=4)


def test_config_names_and_values() -> None:
    assert ItemInputConfig.from_dict({**asdict(CONFIG), "hidden_dims": [8, 5]}) == CONFIG
    with pytest.raises(InputError, match="does not know hidden; valid names: num_features, hidden_dims"):
        ItemInputConfig.from_dict({"hidden": [3]})
    changes = [{"num_positions": 0}, {"hidden_dims": (0,)}, {"input_dropout": 1.0}, {"temperature": 0.0}]
    for change in changes:
        with pytest.raises(InputError, match=f"{next(iter(change))}|temperature"):
            replace(CONFIG, **change)
