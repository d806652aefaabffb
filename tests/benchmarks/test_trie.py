import json
from dataclasses import replace

import pytest
import torch

from benchmarks import trie as benchmark
from benchmarks.catalogues import random_semantic_ids
from benchmarks.trie import build_rows, paths, step_rows, verdict, verify
from modules.generation.trie import PrefixTrie


def test_paths_by_hand():
    trie = PrefixTrie.from_semantic_ids(torch.tensor([[1, 0], [0, 2], [0, 1]]))
    assert paths(trie).tolist() == [[0, 1], [0, 2], [1, 0]]


def test_a_wrong_trie_is_noticed():
    semantic_ids = random_semantic_ids(60, (4, 4, 4))
    trie = PrefixTrie.from_semantic_ids(semantic_ids)
    verify(trie, semantic_ids)
    with pytest.raises(AssertionError, match="a leaf's path"):
        verify(replace(trie, leaf_items=trie.leaf_items.flip(0)), semantic_ids)
    with pytest.raises(AssertionError, match="items are missing"):
        verify(replace(trie, leaf_items=torch.zeros_like(trie.leaf_items)), semantic_ids)


def test_rows():
    rows, trie = build_rows("small", random_semantic_ids(200, (8, 8, 8)), repeats=2)
    assert [row["implementation"] for row in rows] == ["ours", "python_dict"]
    assert rows[0]["resident_mb"] >= 0
    assert len(rows[0]["level_mb"]) == 4
    assert rows[1]["times_ours"] > 0
    steps = step_rows(trie, 8, batch_size=3, repeats=2)
    assert [row["nodes"] for row in steps[:2]] == [1, 8]
    assert all(row["median_ms"] > 0 for row in steps)


def test_the_claims_by_hand():
    row = {"implementation": "ours", "items": 10_000_000, "resident_mb": 150.0, "median_ms": 9000.0, "case": "a"}
    assert [claim["holds"] for claim in verdict([row], "cpu")] == [True]
    assert [claim["holds"] for claim in verdict([row | {"resident_mb": 201.0}], "cpu")] == [False]
    assert [claim["holds"] for claim in verdict([row | {"median_ms": 11000.0}], "cpu")] == [False]
    assert verdict([row | {"items": 100}, row | {"case": "a, no claim"}], "cpu") == []
    steps = [{"implementation": "trie_topk_step", "items": 20_000_000, "median_ms": ms} for ms in (0.01, 0.06)]
    assert [claim["holds"] for claim in verdict(steps, "cuda")] == [False]
    assert verdict(steps, "cpu") == []


def test_results_are_written(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path), "--items", "300"]
    assert benchmark.main(arguments) == 0
    (path,) = tmp_path.rglob("trie-quick.json")
    cases = [row["case"] for row in json.loads(path.read_text())["rows"]]
    assert cases[0] == "build, 300 items, 256 x 3 + dedup"
    assert len(cases) == 2 + 4 + 2
