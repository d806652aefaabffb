import json

import pytest
import torch

from benchmarks import add_items


def test_writes_rows_of_every_mode(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(add_items, "QUICK_ITEMS", 600)
    monkeypatch.setattr(add_items, "QUICK_ADDED", 5)
    assert add_items.main(["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/add_items-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["ours", "ours_saved", "built_anew"] * 2
    assert {row["case"].split(":")[0] for row in rows} == set(add_items.MODES)
    assert all(row["median_ms"] > 0 for row in rows)


def test_scores_that_are_not_the_models_are_noticed(monkeypatch) -> None:
    joining = add_items.random_joining(600, 5, "cpu")
    monkeypatch.setattr(add_items, "cosines", lambda _: torch.zeros(605))
    with pytest.raises(AssertionError, match="not close"):
        add_items.verify(joining)
