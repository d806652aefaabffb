import json
import re

from benchmarks.common import device_name, measure, print_table, summarize, write_result


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
