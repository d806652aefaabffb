import re

import pytest

from data.schemas import InputError
from reports.runs.report import write_run_report
from tests.reports.runs.folders import SELECTION, final_metrics, write_json, write_run


def report(tmp_path, *runs):
    path = tmp_path / "pages/report.html"
    write_run_report(path, runs)
    return path.read_text()


def section(page, name):
    return re.search(rf'<section id="{name}".*?</section>|<section[^>]* id="{name}".*?</section>', page, re.DOTALL)[0]


def cells(markup):
    """Text of the cells of every row that has any."""
    rows = re.findall(r"<tr>(.*?)</tr>", markup, re.DOTALL)
    found = [
        [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows
    ]
    return [[" ".join(words) for words in row] for row in found if row]


def test_one_run(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    assert f"Finished: {SELECTION} 0.1" in section(page, "verdict")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section(page, "curves")) == [
        SELECTION,
        "training loss",
        "gradient norm",
        "learning rate",
        "examples per second",
    ]
    assert "Some GPU" in section(page, "environment")
    assert "c092401683c3" in section(page, "environment")


def test_final_metrics_with_their_intervals_and_the_best_of_each(tmp_path):
    results = section(report(tmp_path, write_run(tmp_path / "run")), "results")
    assert "test, all, 1,234 users" in results
    assert cells(results)[0] == ["generative", "0.1000 0.0900 to 0.1100", "0.1000 0.0900 to 0.1100"]
    assert cells(results)[1] == ["popularity", "0.0500 0.0450 to 0.0550", "0.0500 0.0450 to 0.0550"]
    assert len(re.findall(r'class="best">0\.1000<', results)) == results.count('class="best"') == 8


def test_runs_side_by_side(tmp_path):
    runs = [write_run(tmp_path / "one", scale=1.0), write_run(tmp_path / "two", scale=2.0, learning_rate=0.01)]
    page = report(tmp_path, *runs)
    assert f"2 runs, 2 finished: two is ahead, {SELECTION} 0.2" in section(page, "verdict")
    results = cells(section(page, "results"))
    assert [row[0] for row in results[:3]] == ["generative one", "popularity all runs", "generative two"]
    changed = cells(section(page, "settings").partition("<details>")[0])
    assert changed == [["decoder/LoopConfig.learning_rate", "0.001 run.gin:4", "0.01 run.gin:4"]]
    entries = re.findall(r'<div class="legend">(.*?)</div>', section(page, "curves"))
    assert len(entries) == 5
    assert all(re.findall(r">(\w+)</span>", entry) == ["one", "two"] for entry in entries)


def test_settings_that_were_changed_during_a_run(tmp_path):
    run = write_run(tmp_path / "run")
    assert "Changed during a run" not in report(tmp_path, run)
    change = {
        "started": "2026-01-03",
        "name": "LoopConfig.num_steps",
        "before": "50",
        "now": "100",
        "origin": "x.gin:1",
    }
    write_json(run / "env.json", {"run_format": 1, "changes": [change, "damage"]})
    page = report(tmp_path, run)
    assert cells(section(page, "settings"))[0] == ["LoopConfig.num_steps", "50", "100", "2026-01-03", "run"]


def test_runs_on_different_data_are_not_ranked(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", scale=2.0)
    write_json(two / "env.json", {"data_manifest_hash": "other"})
    page = report(tmp_path, one, two)
    assert "<h2>2 runs, 2 finished, on different data</h2>" in page
    assert 'class="best"' not in page
    assert "on different data, none is best" in page


def test_metrics_of_different_users_are_not_ranked(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", scale=2.0)
    metrics = final_metrics(2.0) | {"generative/test/all/count": 1000}
    write_json(two / "metrics.json", {name: value for name, value in metrics.items() if "/test/all/" in name})
    results = section(report(tmp_path, one, two), "results")
    assert "test, all, 1,000 to 1,234 users" in results
    table_of_test = results.partition("test, all")[2].partition("</table>")[0]
    assert 'class="best"' not in table_of_test
    assert 'class="best"' in results


def test_a_run_that_has_only_begun_beside_one_that_finished(tmp_path):
    begun = tmp_path / "begun"
    write_json(begun / "env.json", {"run_format": 1})
    page = report(tmp_path, begun, write_run(tmp_path / "done"))
    assert "2 runs, 1 finished" in section(page, "verdict")
    assert 'class="warn"' in page
    alone = report(tmp_path, begun)
    assert "Nothing was logged yet." in alone
    assert "No final metrics yet" in alone


def test_metrics_of_runs_that_do_not_rank(tmp_path):
    run = write_run(tmp_path / "run")
    write_json(run / "metrics.json", {"valid/loss": 0.65567, "codebook/use_level_0": 1.0, "steps": 100})
    assert cells(section(report(tmp_path, run), "results")) == [
        ["valid/loss", "0.65567"],
        ["codebook/use_level_0", "1"],
    ]


def test_nine_runs_have_nine_looks(tmp_path):
    page = report(tmp_path, *(write_run(tmp_path / f"run{index}") for index in range(9)))
    assert len(set(re.findall(r'class="line ([^"]+)"', section(page, "curves")))) == 9


def test_the_page_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/report\.html"):
        write_run_report(tmp_path / "file/report.html", [run])


def test_names_and_values_are_text_and_never_markup(tmp_path):
    run = write_run(tmp_path / "<b>run")
    text = (run / "operative_config.gin").read_text()
    (run / "operative_config.gin").write_text(text + "x.y = '<script>1</script>'  # <i>.gin:1\n")
    page = report(tmp_path, run)
    assert not re.search(r"<b>|<i>|<script>", page)
    assert "&lt;b&gt;run" in page
