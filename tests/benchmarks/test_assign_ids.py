import json
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import assign_ids
from benchmarks.assign_ids import agreement, build_features, build_model, contenders, run, verify
from benchmarks.assigned_files import check_disk, run_files, write_features
from data.schemas import InputError
from modules.rqvae import RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer

CONFIG = RqVaeConfig(input_dim=12, embed_dim=4, hidden_dims=(8,), codebook_sizes=(9, 7))


def test_agreement_by_hand() -> None:
    codebooks = [torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[0.0], [0.5]]).double()]
    # 0.9 takes 0, leaving 0.9, which takes 0.5; 1.9 takes 2, leaving -0.1, which takes 0.
    latent = torch.tensor([[0.9], [1.9]]).double()
    assert agreement(torch.tensor([[0, 1], [1, 0]]), latent, codebooks) == (1.0, 0.0)
    share, gap = agreement(torch.tensor([[1, 0], [1, 1]]), latent, codebooks)
    assert share == 0.0
    # Squared distances 1.21 instead of 0.81, by 0.81 + 4; 0.36 instead of 0.01, by 0.01 + 0.25.
    assert gap == pytest.approx(max(0.4 / 4.81, 0.35 / 0.26))


def test_ours_agrees_and_a_wrong_code_is_noticed() -> None:
    features = build_features(300, 12, "cpu")
    model = build_model(features, CONFIG)
    ours = contenders(model, torch.float32)["ours"]
    found = verify("ours", ours, model, features, torch.float32)
    assert found["equal_encoder"] > 0.99
    assert found["gap_distances_ppm"] <= found["bound_distances_ppm"] == 5.0
    with pytest.raises(AssertionError, match="ours differs from double precision"):
        verify("ours", lambda part: ours(part).flip(0), model, features, torch.float32)


def test_rows() -> None:
    features = build_features(2000, 12, "cpu")
    rows = run(build_model(features, CONFIG), features, 2)
    assert [row["implementation"] for row in rows] == ["ours", "plain_eager"]
    assert rows[1]["equal_encoder"] > 0.99
    assert rows[0]["ms_per_million"] == pytest.approx(rows[0]["median_ms"] * 500, rel=1e-3)


def test_results_are_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign_ids, "WIDTH", 12)
    monkeypatch.setattr(assign_ids, "FILE_WIDTH", 12)
    monkeypatch.setattr(assign_ids, "FILE_LENGTHS", (125_000, 500_000))
    monkeypatch.setattr(assign_ids, "ROWS_PER_SHARD", 125 * 300)
    monkeypatch.setattr(assign_ids, "RqVaeConfig", lambda input_dim: CONFIG)
    assert assign_ids.main(["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("assign_ids-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["case"] == "20,000 x 12, float32 encoder"
    files = [row for row in rows if "file" in row["case"]]
    assert [(row["case"], row["implementation"]) for row in files] == [
        ("1,000 x 12, float16 file", "ours"),
        ("1,000 x 12, float16 file", "plain_eager"),
        ("4,000 x 12, float16 file", "ours"),
        ("4,000 x 12, float16 file", "plain_eager"),
    ]
    assert [row.get("num_shards") for row in files] == [4, None, 14, None]
    for row in files:
        assert row["rows_per_s"] == pytest.approx(
            int(row["case"].split(" ")[0].replace(",", "")) / row["seconds"], rel=0.1
        )


def test_wrong_shards_are_noticed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(build_features(300, 12, "cpu"), CONFIG)
    right = SemanticIdTokenizer.encode

    def wrong(self: SemanticIdTokenizer, features: Any, **options: Any) -> Any:
        return right(self, features, **options) if isinstance(features, np.ndarray) else right(self, features).flip(0)

    monkeypatch.setattr(SemanticIdTokenizer, "encode", wrong)
    with pytest.raises(AssertionError, match=r"ids-00000-of-00001\.parquet has other codes than the rows in memory"):
        run_files(model, (200,), 200, tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(InputError, match=r"GB free; the vectors need 844800000000\.0 GB\. Set TMPDIR"):
        check_disk(tmp_path, 10**18, 384)


def test_generated_files_are_whole(tmp_path) -> None:
    write_features(tmp_path / "features.npy", 70_000, 3)
    rows = np.load(tmp_path / "features.npy")
    assert rows.shape == (70_000, 3)
    assert rows.dtype == np.float16
    assert float(np.square(rows.astype(np.float32)).sum(axis=1).mean()) == pytest.approx(1.0, abs=0.02)
