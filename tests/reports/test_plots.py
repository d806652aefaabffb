import json
import struct
import sys

import pytest

from data.schemas import InputError
from reports.plots import plot_run


def write_log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def size_of(png):
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_every_kind_of_curve_gets_its_figure(tmp_path):
    log = write_log(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "seconds": 0.1, "train/loss": 2.0, "train/learning_rate": 0.1, "train/examples_per_second": 9},
            {"step": 2, "valid/loss": 1.5, "codebook/use_level_0": 0.5, "codebook/use_level_1": 0.25},
            {"step": 2, "generative/valid/all/ndcg@10": 0.1, "generative/valid/cold/ndcg@10": None},
            {"step": 3, "train/loss": 1.0, "train/learning_rate": 0.05},
        ],
    )
    with log.open("a") as file:
        file.write('{"step": 4, "train/lo')
    written = plot_run(log, tmp_path / "report")
    assert [path.name for path in written] == ["codebook.png", "learning_rate.png", "loss.png", "metrics.png"]
    assert all(size_of(path)[0] > 400 for path in written)


def test_figures_without_data_are_left_out(tmp_path):
    log = write_log(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 2.0}])
    assert [path.name for path in plot_run(log, tmp_path / "report")] == ["loss.png"]
    assert plot_run(write_log(tmp_path / "empty.jsonl", []), tmp_path / "report") == []


def test_levels_and_slices_share_a_panel_and_bounds_are_not_drawn(tmp_path):
    one = write_log(tmp_path / "one.jsonl", [{"step": 1, "a/x@1": 1.0, "b/x@1": 1.0, "a/x@1_ci95_low": 0.5}])
    two = write_log(tmp_path / "two.jsonl", [{"step": 1, "a/x@1": 1.0, "a/y@1": 1.0}])
    (single,), (double,) = plot_run(one, tmp_path / "r1"), plot_run(two, tmp_path / "r2")
    assert size_of(double)[0] == 2 * size_of(single)[0]


def test_a_loss_of_each_level_is_a_loss_and_the_size_of_a_slice_no_metric(tmp_path):
    log = write_log(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss_level_0": 2.0, "g/valid/all/count": 9}])
    assert [path.name for path in plot_run(log, tmp_path / "report")] == ["loss.png"]


def test_without_matplotlib_nothing_is_drawn_and_that_is_said(tmp_path, monkeypatch, capsys):
    """It comes last in a training run, which must not fail for it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log = write_log(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 2.0}])
    assert plot_run(log, tmp_path / "report") == []
    assert capsys.readouterr().out == "no plots: matplotlib is not installed\n"


def test_a_missing_log(tmp_path):
    with pytest.raises(InputError, match=r"none.jsonl does not exist; give the metrics.jsonl of a run folder"):
        plot_run(tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "features.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InputError, match=r"cannot read .*features\.npy \(.*Give the metrics\.jsonl of a run"):
        plot_run(tmp_path / "features.npy", tmp_path)
