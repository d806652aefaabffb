import json
from pathlib import Path

import pytest

import modules.model
from benchmarks import liger_step
from benchmarks.common import REPOSITORY
from benchmarks.histories import build_batches, read_lengths
from benchmarks.liger_step import OURS, SIZES, TIGER, Settings, Size, configs_of, memory_rows, run, verdict, verify

TINY = Size({"num_heads": 1, "head_dim": 8, "d_ff": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}, 6, (8,))


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config, batches = configs_of(TINY)[OURS], build_batches(read_lengths(None)[0], 8)
    verify(config, batches, "cpu")
    assert "gradients of LIGER equal those of all 12,101 scores at once" in capsys.readouterr().out
    exact = modules.model.catalogue_loss
    monkeypatch.setattr(modules.model, "catalogue_loss", lambda *given, **named: 1.01 * exact(*given, **named))
    with pytest.raises(AssertionError):
        verify(config, batches, "cpu")


def test_a_row_for_every_contender() -> None:
    settings = Settings(device="cpu", precision="no", batch_size=8, warmup=1, repeats=1)
    names = [TIGER, "dense_only", "tiger_text"]
    rows = {row["implementation"]: row for row in run("tiny", TINY, names, read_lengths(None)[0], settings)}
    assert list(rows) == names
    assert all(row["median_ms"] > 0 and row["times_tiger"] > 0 for row in rows.values())
    assert rows[TIGER]["times_tiger"] == 1.0


def test_an_example_that_keeps_features_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(device="cpu", precision="no", batch_size=8, warmup=1, repeats=2)
    narrow, wide = memory_rows("tiny", TINY, read_lengths(None)[0], settings)
    assert narrow["kept_kb"] == wide["kept_kb"] > 0
    monkeypatch.setattr(liger_step, "kept_kb", lambda config, *given: float(config.items.num_features))
    with pytest.raises(AssertionError, match=r"keeps more with wider features: \[6.0, 24.0\] KB"):
        memory_rows("tiny", TINY, read_lengths(None)[0], settings)


def test_the_claim_is_about_ours() -> None:
    rows = [
        {"case": "small", "implementation": TIGER, "times_tiger": 1.0},
        {"case": "small", "implementation": OURS, "times_tiger": 1.5},
        {"case": "memory", "implementation": OURS, "kept_kb": 1.0},
    ]
    assert verdict(rows, "cpu") == ["claim: at most 2.0 times a TIGER step; small: 1.5, met"]
    assert verdict(rows, "cuda") == ["claim: at most 1.3 times a TIGER step; small: 1.5, MISSED"]


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "small", TINY)
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--batch-size", "8", "--results", str(tmp_path)]
    assert liger_step.main(arguments) == 0
    (path,) = tmp_path.rglob("liger_step-quick.json")
    assert [row["implementation"] for row in json.loads(path.read_text())["rows"]] == [TIGER, OURS, OURS, OURS]


def test_sizes_are_those_of_the_configs() -> None:
    lines = (REPOSITORY / "configs/base/small.gin").read_text()
    model = configs_of(SIZES["small"])[OURS]
    for name in ("d_model", "num_heads", "head_dim", "d_ff", "num_encoder_layers", "num_decoder_layers", "dropout"):
        assert f"RetrievalModelConfig.{name} = {getattr(model, name)}\n" in lines
    lines = (REPOSITORY / "configs/liger_beauty_minilm.gin").read_text()
    assert f"ItemInputConfig.hidden_dims = {SIZES['small'].hidden_dims}\n" in lines
    full = configs_of(SIZES["full"])[OURS]
    assert (full.d_model, full.num_heads, full.head_dim, full.d_ff) == (128, 6, 64, 1024)
    liger = (REPOSITORY / "configs/base/liger.gin").read_text()
    assert f"ItemInputConfig.hidden_dims = {SIZES['full'].hidden_dims}\n" in liger
