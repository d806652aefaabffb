import json
import re

import numpy as np
import pytest
import torch

from benchmarks.common import (
    begin,
    device_name,
    interleaved,
    measure,
    parser,
    peak_memory,
    print_table,
    ratios,
    summarize,
    write_result,
)
from data.files import without_paths
from data.schemas import InputError


def test_results_carry_the_envelope(tmp_path):
    path = write_result("thing", [{"case": "a", "implementation": "ours", "median_ms": 1.5}], results=tmp_path)
    assert path == tmp_path / device_name() / "thing.json"
    result = json.loads(path.read_text())
    assert list(result) == ["name", "device", "commit", "versions", "command", "date", "rows"]
    assert result["device"].startswith("cpu-")
    assert result["rows"] == [{"case": "a", "implementation": "ours", "median_ms": 1.5}]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", result["versions"]["torch"])
    assert "/" not in result["command"].split()[1]


def test_quick_runs_do_not_replace_full_ones(tmp_path):
    full, quick = (write_result("thing", [], quick=quick, results=tmp_path) for quick in (False, True))
    assert (full.name, quick.name) == ("thing.json", "thing-quick.json")


def test_summary_by_hand():
    assert summarize([0.001, 0.002, 0.003, 0.004, 0.011]) == {"median_ms": 3.0, "p20_ms": 1.8, "p80_ms": 5.4}


def test_warm_up_is_not_timed():
    calls = []
    assert len(measure(lambda: calls.append(1), repeats=4, warmup=2)) == 4
    assert len(calls) == 6


def test_table_has_a_column_for_every_key(capsys):
    print_table([{"case": "a", "ms": 1.25}, {"case": "bb", "mb": 3}])
    assert capsys.readouterr().out.splitlines() == ["case  ms     mb", "a     1.250", "bb           3"]


def test_several_calls_make_one_sample():
    calls = []
    assert len(measure(lambda: calls.append(1), repeats=3, warmup=1, calls=5)) == 3
    assert len(calls) == 1 + 3 * 5


def test_contenders_take_turns():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_peak_memory_counts_what_is_freed_again():
    result = {}
    with peak_memory(result):
        np.ones(8 * 2**20).sum()  # 64 MB
    assert 60 < result["peak_mb"] < 90


def test_ratios_by_hand():
    rows = [
        {"implementation": "ours", "median_ms": 2.0},
        {"implementation": "theirs", "median_ms": 5.0},
        {"implementation": "nobody", "note": "n/a"},
    ]
    assert ratios(rows, of="ours") == {"theirs": 2.5}
    assert ratios(rows, of="nobody") == {}


def test_results_name_no_paths_of_this_machine():
    text = without_paths("python -m benchmarks.x --results /somewhere/out --lengths data/x --y=/a/b")
    assert text == "python -m benchmarks.x --results out --lengths data/x --y=b"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_device_is_the_one_that_is_there():
    threads = torch.get_num_threads()
    try:
        assert begin(parser("").parse_args(["--threads", "1"])) == "cpu"
        assert torch.get_num_threads() == 1
        with pytest.raises(InputError, match="--device cuda: PyTorch finds no GPU here"):
            begin(parser("").parse_args(["--device", "cuda"]))
    finally:
        torch.set_num_threads(threads)
