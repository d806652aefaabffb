import json

import pytest
import torch
from torch import nn

from benchmarks import rqvae_step
from benchmarks.plain_rqvae import PlainRqVae
from benchmarks.rqvae_step import RUNGS, build_batch, build_model, run, verify
from modules.rqvae import RqVaeConfig

CONFIG = RqVaeConfig(input_dim=12, embed_dim=4, hidden_dims=(8, 6), codebook_sizes=(5, 3))


def test_the_plain_model_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    x = build_batch(40, 12, "cpu")
    verify(build_model(x, CONFIG), x)
    assert "14 gradients equal" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["encoder.linears.0.weight", "quantizers.1.weight"])
def test_a_difference_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = build_batch(40, 12, "cpu")
    model = build_model(x, CONFIG)

    class Changed(PlainRqVae):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            with torch.no_grad():
                self.get_parameter({"encoder.linears.0.weight": "encoder.0.weight"}.get(part, "codebooks.1")).mul_(1.1)

    monkeypatch.setattr(rqvae_step, "PlainRqVae", Changed)
    with pytest.raises(AssertionError):
        verify(model, x)


def test_a_row_for_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    x = build_batch(40, 12, "cpu")
    rows = {row["implementation"]: row for row in run("tiny", build_model(x, CONFIG), x, RUNGS, 2, bf16=False)}
    assert tuple(rows) == RUNGS
    for name in ("ours", "ours_compiled", "plain_eager", "plain_compiled"):
        assert rows[name]["median_ms"] > 0
        assert rows[name]["loss"] == pytest.approx(rows["ours"]["loss"], abs=2e-4)
    assert rows["ours_graphed"]["note"] == "n/a: CUDA graphs need a GPU"
    assert "times_ours" in rows["plain_eager"]


def test_results_are_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rqvae_step, "WIDTH", 12)
    monkeypatch.setattr(rqvae_step, "RqVaeConfig", lambda input_dim: CONFIG)
    assert rqvae_step.main(["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("rqvae_step-quick.json")
    assert json.loads(path.read_text())["rows"][0]["implementation"] == "ours"
