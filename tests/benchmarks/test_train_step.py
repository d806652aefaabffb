import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.rungs import UnavailableError
from modules.model import EncoderDecoderRetrievalModel

SIZES = {"num_heads": 2, "head_dim": 8, "d_ff": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.fixture
def setting(monkeypatch):
    config = train_step.RetrievalModelConfig
    monkeypatch.setattr(train_step, "RetrievalModelConfig", lambda **values: config(**values, **SIZES))
    return train_step.build_setting(16, 8, np.full(40, 9), device="cpu", bf16=False)


def test_all_contenders_train_on_the_same_batches(setting):
    names = ("ours", "ours_graphed", "hf_t5_eager", "hf_t5_sdpa")
    rows = {row["implementation"]: row for row in train_step.run("case", setting, names, num_samples=2)}
    assert rows["ours_graphed"]["note"] == "n/a: CUDA graphs need a GPU"
    for name in ("ours", "hf_t5_eager", "hf_t5_sdpa"):
        assert 0 < rows[name]["loss_last"] < 1.1 * rows[name]["loss_first"]
        assert rows[name]["peak_mb"] > 0
    assert rows["hf_t5_eager"]["loss_first"] == pytest.approx(rows["hf_t5_sdpa"]["loss_first"], rel=0.02)
    assert rows["ours"]["vs_hf_t5_eager"] > 0


def test_a_wrong_model_is_not_timed(setting):
    setting.model.embedding.weight.data[5:].mul_(1.01)
    train_step.verify(setting)
    original = EncoderDecoderRetrievalModel.log_likelihood
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderDecoderRetrievalModel, "log_likelihood", lambda *a: 1.001 * original(*a))
        with pytest.raises(AssertionError):
            train_step.verify(setting)


def test_without_transformers_ours_is_verified_against_the_reference(setting, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "has_transformers", lambda: False)
    train_step.verify(setting)
    assert "the reference ops (transformers is not installed)" in capsys.readouterr().out


def test_graphs_need_a_gpu(setting):
    with pytest.raises(UnavailableError):
        train_step.hf_t5_reduce_overhead(setting)


def test_ratios_by_hand():
    rows = [
        {"implementation": "ours", "median_ms": 2.0, "peak_mb": 30.0},
        {"implementation": "hf_t5_eager", "median_ms": 8.0, "peak_mb": 100.0},
        {"implementation": "hf_t5_sdpa", "median_ms": 6.0, "peak_mb": 120.0},
    ]
    train_step.add_ratios(rows)
    assert rows[0]["speed_vs_fastest_hf"] == 3.0
    assert (rows[0]["vs_hf_t5_eager"], rows[0]["vs_hf_t5_sdpa"]) == (4.0, 3.0)
    assert rows[0]["memory_vs_smallest_hf"] == 0.3
    assert rows[1]["speed_vs_fastest_hf"] == 0.75
