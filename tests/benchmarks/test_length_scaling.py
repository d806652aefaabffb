import pytest
import torch

import ops
from benchmarks import length_scaling
from benchmarks.length_scaling import plot, run, verdict, without_attention


def test_rows_and_plot(monkeypatch, tmp_path):
    config = length_scaling.RetrievalModelConfig
    small = {"d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32}
    monkeypatch.setattr(length_scaling, "RetrievalModelConfig", lambda **values: config(**values, **small))
    rows = run((4, 8), num_rows=2, num_layers=1, device="cpu", repeats=2)
    assert [row["tokens"] for row in rows] == [2 * 17, 2 * 33]
    assert all(row["rest_ms"] > 0 for row in rows)
    assert verdict(rows) is None
    plot(rows, tmp_path / "curve.svg")
    assert "</svg>" in (tmp_path / "curve.svg").read_text()


def test_stand_ins_pass_gradients_on_and_leave_no_trace():
    before = ops.jagged_attention
    q, kv = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 2, 2, 4, requires_grad=True)
    with without_attention() as calls:
        ops.jagged_attention(q, kv, None, None).sum().backward()
    assert calls == [1]
    assert ops.jagged_attention is before
    assert q.grad is not None
    assert kv.grad is not None


@pytest.mark.parametrize(("last", "holds"), [(2.6, True), (2.8, False)])
def test_the_claim_by_hand(last, holds):
    rows = [{"items": items, "rest_us_per_token": cost} for items, cost in ((64, 1.8), (128, 2.0), (1024, last))]
    judged = verdict(rows)
    assert judged is not None
    assert judged["growth_per_token"] == last / 2
    assert judged["holds"] is holds
