import pytest
import torch

from data.processed import DatasetConfig, RecDataset, load_dataset
from data.schemas import SPLIT_ROLES
from tasks.protocol import EvaluationProtocol
from tests.tiny_dataset import NUM_COLD_TEST, NUM_ITEMS, NUM_USERS, walks, write_interactions

COLD_USERS = {
    "beauty": {"leave_one_out": (33, 51, 138), "liger": (44, 68, 162)},
    "sports": {"leave_one_out": (73, 118, 317), "liger": (81, 130, 342)},
}
"""Cold items, and validation and test users whose targets they are: those of LIGER's paper, and those by default."""


def test_counts_of_users_by_their_targets(tmp_path):
    write_interactions(tmp_path / "log.csv")
    protocol = EvaluationProtocol.of(
        load_dataset(walks(tmp_path, tmp_path / "log.csv")), "leave_one_out", max_history=3
    )
    warm = {"all": NUM_USERS, "warm": NUM_USERS, "cold": 0, "cold_items": 0}
    cold = {"cold": NUM_COLD_TEST, "warm": NUM_USERS - NUM_COLD_TEST, "cold_items": NUM_COLD_TEST}
    assert protocol.counts("valid") == warm
    assert protocol.counts("test") == warm | cold
    assert protocol.describe() == (
        f"walks, leave_one_out: {NUM_ITEMS} items ranked, seen items excluded; cold: {NUM_COLD_TEST} items, "
        f"0 of {NUM_USERS} valid and {NUM_COLD_TEST} of {NUM_USERS} test users"
    )


def test_counts_agree_with_those_of_the_metrics(tmp_path):
    write_interactions(tmp_path / "log.csv")
    dataset = load_dataset(walks(tmp_path, tmp_path / "log.csv"))
    protocol = EvaluationProtocol.of(dataset, "liger", max_history=3)
    for role in SPLIT_ROLES[1:]:
        metrics = protocol.evaluate(protocol.baselines(), role)
        for part in ("all", "warm", "cold"):
            assert metrics[f"popularity/{role}/{part}/count"] == protocol.counts(role)[part]


def test_baselines_read_as_much_of_a_history_as_the_others(tmp_path):
    write_interactions(tmp_path / "log.csv")
    dataset = load_dataset(walks(tmp_path, tmp_path / "log.csv"))
    protocol = EvaluationProtocol.of(dataset, "leave_one_out", max_history=33)
    assert [(ranker.name, ranker.max_history) for ranker in protocol.baselines()] == [
        ("popularity", 33),
        ("item_knn", 33),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("category", ["beauty", "sports"])
def test_cold_start_counts_of_amazon(shared_data, tmp_path, category):
    raw_dir = str(shared_data / "amazon_p5")
    config = DatasetConfig(dataset=RecDataset.AMAZON, category=category, root=str(tmp_path), raw_dir=raw_dir)
    dataset = load_dataset(config)
    for split, (items, valid, test) in COLD_USERS[category].items():
        protocol = EvaluationProtocol.of(dataset, split, max_history=20)
        assert int(protocol.cold.sum()) == items
        assert [protocol.counts(role)["cold"] for role in ("valid", "test")] == [valid, test]
        assert f"; cold: {items} items, {valid} of" in protocol.describe()
        seen = torch.zeros(len(dataset.catalogue), dtype=torch.bool)
        seen[protocol.split.train.interactions(dataset.histories)[1]] = True
        assert torch.equal(protocol.cold, ~seen)
