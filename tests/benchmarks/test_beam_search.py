import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import beam_rungs, beam_search
from benchmarks.beam_rungs import Rung, build_generator, build_histories, build_model, build_setting, ours
from benchmarks.beam_search import agreement, build_rungs, overlap, run_beauty, verdict, verify
from benchmarks.catalogues import memory_mb, random_semantic_ids, require_memory
from benchmarks.hf_generate import allowed_tokens
from benchmarks.rungs import UnavailableError
from data.schemas import NO_ITEM

SIZES = {"d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_encoder_layers": 2, "num_decoder_layers": 2}
LENGTHS = np.array([2, 9, 30])


@pytest.fixture
def model(monkeypatch):
    config = beam_rungs.RetrievalModelConfig
    monkeypatch.setattr(beam_rungs, "RetrievalModelConfig", lambda **values: config(**values, **SIZES))
    return build_model("cpu")


def tiny_setting(model, num_items=300, batch_size=6):
    return build_setting(model, LENGTHS, num_items=num_items, batch_size=batch_size, dtype="fp32")


def test_random_semantic_ids_tell_items_apart():
    semantic_ids = random_semantic_ids(40, (2, 3))
    assert len(semantic_ids.unique(dim=0)) == 40
    for codes in semantic_ids[:, :2].unique(dim=0):
        same = semantic_ids[(semantic_ids[:, :2] == codes).all(1)]
        assert same[:, 2].tolist() == list(range(len(same)))  # in the order of items


def test_histories_leave_the_newest_item_out():
    histories = build_histories(LENGTHS, 50, 300)
    assert set(histories.offsets.diff().tolist()) == {1, 8, 20}
    assert int(histories.item_ids.max()) < 300


def test_memory_by_hand(model):
    shared = torch.zeros(2**18)  # one MB
    assert memory_mb([shared, {"again": shared.view(2, -1)}, (torch.zeros(2**17, dtype=torch.int16), None)]) == 1.25
    assert memory_mb(tiny_setting(model).trie()) > 0
    require_memory(0.001, "nothing", "cpu")
    with pytest.raises(UnavailableError, match="a table needs about 1,000,000,000 MB"):
        require_memory(1e9, "a table", "cpu")


def test_allowed_tokens_by_hand():
    allowed = allowed_tokens(torch.tensor([[5, 9], [3, 8], [5, 7]]))
    assert {prefix: tokens.tolist() for prefix, tokens in allowed.items()} == {(): [3, 5], (5,): [7, 9], (3,): [8]}


def test_agreement_by_hand():
    scores = torch.tensor([[-1.0, -2.0, -2.00001, -5.0]])
    expected = torch.tensor([[4, 5, 6, 7]]), scores
    assert agreement((torch.tensor([[4, 6, 5, 8]]), scores), expected) == 1.0  # near-tied, and the last place
    assert agreement((torch.tensor([[5, 4, 6, 7]]), scores), expected) == 0.0
    assert agreement((expected[0], scores - 0.001), expected) == 0.0
    nothing = torch.tensor([[4, 5, NO_ITEM, NO_ITEM]]), torch.tensor([[-1.0, -2.0, -torch.inf, -torch.inf]])
    assert agreement(nothing, nothing) == 1.0
    assert agreement(nothing, expected) == 0.0


def test_lists_are_those_of_hugging_face(model):
    setting = tiny_setting(model)
    rungs, facts = build_rungs(setting, ["ours", "ours_children", "ours_graphed", "dense_mask"])
    assert facts["ours_graphed"]["note"] == "n/a: CUDA graphs need a GPU"
    found = verify(setting, rungs, 20)
    for name in ("ours", "ours_children", "dense_mask"):
        assert found[name] == {"equal_lists": 1.0}
    assert found["hf_generate_prefix_allowed"] == {"valid_share": 1.0}
    assert found["hf_generate"]["valid_share"] < 0.5


def test_a_beam_wider_than_the_catalogue(model):
    setting = tiny_setting(model, num_items=7)
    item_ids, scores = build_generator(setting).lists(10, "children")
    assert (item_ids[:, 7:] == NO_ITEM).all()
    assert (scores[:, 7:] == -torch.inf).all()
    rungs, _ = build_rungs(setting, ["ours", "ours_children", "dense_mask"])
    assert verify(setting, rungs, 10)["ours_children"] == {"equal_lists": 1.0}


@pytest.mark.parametrize("transformers", [True, False])
def test_wrong_lists_are_not_timed(model, monkeypatch, transformers):
    monkeypatch.setattr(beam_search, "has_transformers", lambda: transformers)
    setting = tiny_setting(model)
    right = ours(setting)
    assert verify(setting, {"ours": right}, 5)["ours"] == {"equal_lists": 1.0}
    other_scores = Rung(right.search, beam_rungs.ours_children(setting).lists)
    with pytest.raises(AssertionError, match="of the lists of ours are as expected"):
        verify(setting, {"ours": other_scores}, 5)


def test_rows(model):
    names = ["ours", "ours_children", "ours_graphed", "dense_mask", "hf_generate", "hf_generate_prefix_allowed"]
    rows = run_beauty(
        "case", tiny_setting(model), tiny_setting(model, batch_size=1), widths=[1, 3], names=names, rounds=3
    )
    timed = {(row["batch"], row["beam_width"], row["implementation"]) for row in rows if "median_ms" in row}
    searches = {"ours", "dense_mask", "hf_generate", "hf_generate_prefix_allowed"}
    assert timed == {(6, 3, "ours_children")} | {
        (*size, name) for size in ((6, 1), (6, 3), (1, 3)) for name in searches
    }
    row = next(row for row in rows if row["implementation"] == "ours" and row["beam_width"] == 3)
    assert row["case"] == "case, batch 6, beam 3, 300 items, fp32"
    assert {"equal_lists", "resident_mb", "build_s", "peak_mb"} <= row.keys()
    assert all(row["times_ours"] > 0 for row in rows if row["implementation"].startswith("hf"))


def test_what_does_not_fit_has_a_row_that_says_so(model, monkeypatch):
    monkeypatch.setattr("benchmarks.catalogues._available_mb", lambda device: 0.0)
    names = ["ours", "dense_mask", "hf_generate"]
    setting = tiny_setting(model)
    rungs, facts = build_rungs(setting, names)
    rows = beam_search.run_case("case", setting, rungs, facts, 3, rounds=3)
    assert [row["implementation"] for row in rows if "median_ms" in row] == ["ours"]
    assert rows[1]["note"].startswith("n/a: a dense table needs about")
    assert rows[2]["note"].startswith("n/a: a beam of 3 needs about")


def test_the_claims_by_hand():
    row = {"items": beam_search.NUM_ITEMS, "batch": 64, "beam_width": 20}
    rows = [
        {**row, "implementation": "ours", "median_ms": 100.0},
        {**row, "implementation": "hf_generate", "median_ms": 900.0, "times_ours": 9.0},
        {**row, "implementation": "hf_generate_eager", "median_ms": 790.0, "times_ours": 7.9},
        {**row, "implementation": "hf_generate_prefix_allowed", "median_ms": 900.0, "times_ours": 9.0},
        {**row, "implementation": "hf_generate", "median_ms": 1.0, "times_ours": 1.0, "beam_width": 1},
    ]
    claims = verdict(rows, "cpu")
    assert [(claim["measured"], claim["holds"]) for claim in claims] == [(7.9, False), (9.0, True)]
    on_gpu = [{**row, "implementation": "ours_graphed", "batch": 256, "beam_width": 50, "median_ms": 2.9}]
    assert [claim["holds"] for claim in verdict(on_gpu, "cuda")] == [True]
    assert verdict([{**rows[0], "items": 10}], "cpu") == []


def test_results_are_written(model, tmp_path, monkeypatch):
    for module in (beam_rungs, beam_search):
        monkeypatch.setattr(module, "NUM_ITEMS", 200)
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path), "--batch-size", "2"]
    arguments += ["--widths", "2", "--catalogues", "500", "--rungs", "dense_mask"]
    assert beam_search.main(arguments) == 0
    (path,) = tmp_path.rglob("beam_search-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["items"], row["batch"]) for row in rows] == [(200, 2)] * 2 + [(200, 1)] * 2 + [(500, 2)] * 2


def test_bf16_lists_are_reported_not_judged(model):
    setting = replace(tiny_setting(model), dtype="bf16")
    rungs, _ = build_rungs(setting, ["ours", "dense_mask"])
    assert verify(setting, rungs, 5)["ours"]["overlap"] > 0.5


def test_overlap_by_hand():
    scores = torch.zeros(2, 3)
    found = torch.tensor([[1, 2, 3], [4, 5, NO_ITEM]]), scores
    assert overlap(found, (torch.tensor([[3, 1, 9], [5, 6, NO_ITEM]]), scores)) == 0.6
