import pytest
import torch

from benchmarks import add_rms_norm, attention, catalogue_loss, cross_entropy, silu_attention
from benchmarks.rungs import Rung, UnavailableError, contest, disagreement, values_of

LENGTHS = torch.tensor([5, 0, 9, 1])


def by_pass(rows):
    """(implementation, pass) of the rows with times, and the notes of the others."""
    timed = {(row["implementation"], row["pass"]) for row in rows if "median_ms" in row}
    return timed, {row["implementation"]: row["note"] for row in rows if "note" in row}


@pytest.mark.parametrize("name", ["encoder, bias", "decoder, causal, bias", "cross, no bias"])
def test_every_attention_agrees_with_double_precision(name):
    problem = attention.problems(LENGTHS, device="cpu", dtype=torch.float32)[name]
    expected = attention.expected_values(problem)
    assert ("table" in expected) == ("no bias" not in name)
    for build in (attention.ours, attention.sdpa_with_bias, attention.sdpa_ready_mask, attention.padded_eager):
        try:
            values = values_of(build(problem))
        except UnavailableError:
            assert name == "cross, no bias"
            continue
        assert disagreement(values, expected, 1e-4) is None
        assert {"out", "q", "k", "v"} <= values.keys()


def test_flex_attention_agrees_with_double_precision():
    problem = attention.problems(LENGTHS, device="cpu", dtype=torch.float32)["encoder, bias"]
    with torch.compiler.set_stance("force_eager"):
        values = values_of(attention.flex_attention(problem))
    assert disagreement(values, attention.expected_values(problem), 1e-4) is None
    assert values.keys() == {"out"}


def test_attention_rows():
    names = ("ours", "sdpa_with_bias", "flash_varlen_no_bias")
    rows = attention.run(LENGTHS, device="cpu", dtype_name="fp32", repeats=2, names=names)
    timed, notes = by_pass(rows)
    assert timed == {(name, kind) for name in ("ours", "sdpa_with_bias") for kind in ("forward", "backward", "both")}
    assert notes == {"flash_varlen_no_bias": "n/a: needs a GPU and half precision"}
    assert all(row["ours_faster"] > 0 for row in rows if row["implementation"] == "sdpa_with_bias")


def test_silu_attention_rows():
    rows = silu_attention.run("rows", LENGTHS, device="cpu", dtype_name="fp32", repeats=2)
    timed, notes = by_pass(rows)
    assert len(timed) == 2 * 3
    assert notes == {}


def test_add_rms_norm_rows():
    with torch.compiler.set_stance("force_eager"):
        rows = add_rms_norm.run(37, 16, dropout_p=0.0, device="cpu", dtype_name="fp32", repeats=2)
    timed, notes = by_pass(rows)
    assert len(timed) == 5 * 3
    assert notes == {}


def test_cross_entropy_rows():
    with torch.compiler.set_stance("force_eager"):
        rows = cross_entropy.run(33, device="cpu", dtype_name="fp32", repeats=2)
    timed, notes = by_pass(rows)
    assert len(timed) == 5 * 3
    assert notes == {}


def test_catalogue_loss_rows():
    rows = catalogue_loss.run(133, 50, 8, device="cpu", dtype_name="fp32", repeats=2)
    timed, notes = by_pass(rows)
    names = ("ours", "torch_full_logits")
    assert timed == {(name, kind) for name in names for kind in ("forward", "backward", "both")}
    assert notes == {}


def rung(factor):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    return Rung(lambda x: factor * x, {"x": x}, (torch.ones(2),))


def test_a_wrong_baseline_gets_no_time_and_a_wrong_op_stops_everything():
    expected = {"out": torch.tensor([2.0, 4.0]).double(), "x": torch.tensor([2.0, 2.0]).double()}
    on = {"dtype": torch.float32, "device": "cpu", "repeats": 2}
    rows = contest("case", {"ours": lambda: rung(2), "theirs": lambda: rung(2.1)}, expected, **on)
    timed, notes = by_pass(rows)
    assert {name for name, _ in timed} == {"ours"}
    assert notes["theirs"].startswith("n/a: out differs from double precision by 5.0e-02")
    with pytest.raises(AssertionError, match=r"case: ours is wrong, out differs .* nothing is reported"):
        contest("case", {"ours": lambda: rung(2.1)}, expected, **on)


def test_not_a_number_disagrees():
    got, expected = {"out": torch.tensor([float("nan")])}, {"out": torch.tensor([1.0])}
    assert disagreement(got, expected, 1e-4) is not None
