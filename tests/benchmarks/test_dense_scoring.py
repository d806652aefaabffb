import argparse
import json

import pytest
import torch

from benchmarks import dense_scoring as benchmark
from benchmarks.dense_scoring import adding_rows, inputs, run_alone, search_alone, verdict, verify


def test_inputs_of_unit_length_hold_equal_vectors():
    queries, vectors = inputs(100, 7)
    assert (queries.shape, vectors.shape) == ((7, 128), (100, 128))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(100))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(7))
    assert torch.equal(vectors[:10], vectors[90:])
    assert len(vectors.unique(dim=0)) == 90


def test_lists_of_other_items_are_noticed(monkeypatch):
    queries, vectors = inputs(200, 20)
    verify(queries, vectors)
    monkeypatch.setitem(benchmark.SEARCHES, "ours", lambda *parts: benchmark.full_scores(parts[0], parts[1].roll(1)))
    with pytest.raises(AssertionError, match="not those of double precision"):
        verify(queries, vectors)


@pytest.mark.parametrize("name", ["ours", "torch_full_scores"])
def test_one_implementation_is_timed_and_its_memory_taken(name):
    found = search_alone(name, (300, 20, 3), "cpu")
    assert len(found["seconds"]) == 3
    if "peak_mb" in found:
        assert 0 <= found["peak_mb"] < found["process_mb"]


def test_a_process_that_fails_is_an_error(monkeypatch):
    arguments = argparse.Namespace(device="cpu", threads=1)
    monkeypatch.setattr(benchmark.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="ours did not search 300 items"):
        run_alone("ours", 300, 20, 1, arguments)


def test_items_are_added_and_taken_back(monkeypatch):
    monkeypatch.setattr(benchmark, "FEATURES", 8)
    ours, whole = adding_rows(50, 5, 2, "cpu")
    assert ours["case"] == whole["case"] == "5 items added to 50, features of 8"
    assert (ours["implementation"], whole["implementation"]) == ("ours", "project_all")
    assert ours["times_ours"] == 1.0
    assert whole["median_ms"] > 0


@pytest.mark.parametrize(("process_mb", "median_ms", "holds"), [(2000, 999.9, True), (2000.1, 1000, False)])
def test_the_claims_by_hand(process_mb, median_ms, holds):
    rows = [
        {"case": "1,000,000 items x 128, 1,024 queries, k 20", "implementation": "ours", "process_mb": process_mb},
        {"case": "1,000,000 items x 128, 1,024 queries, k 20", "implementation": "other", "process_mb": 9999},
        {"case": "12,101 items x 128, 256 queries, k 20", "implementation": "ours", "process_mb": 9999},
        {"case": "1,000 items added to 12,101", "implementation": "ours", "median_ms": median_ms},
    ]
    assert [claim["holds"] for claim in verdict(rows)] == [holds, holds]


def test_results_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK_CASES", ((300, 20),))
    monkeypatch.setattr(benchmark, "BEAUTY_ITEMS", 50)
    monkeypatch.setattr(benchmark, "FEATURES", 8)
    alone = []
    monkeypatch.setattr(
        benchmark, "run_alone", lambda name, *sizes: alone.append(name) or search_alone(name, sizes[:3], "cpu")
    )
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    (written,) = tmp_path.rglob("dense_scoring-quick.json")
    rows = json.loads(written.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["ours", "torch_full_scores", "ours", "project_all"]
    assert alone == ["ours", "torch_full_scores"]
    assert [row["times_ours"] for row in rows][::2] == [1.0, 1.0]


def test_a_process_prints_what_it_finds(capsys):
    assert benchmark.main(["--alone", "ours", "--sizes", "300", "20", "2", "--device", "cpu", "--threads", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"]) == 2
