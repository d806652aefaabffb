import report
from tests.reports.runs.folders import write_run


def test_a_page_on_two_runs(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    output = tmp_path / "pages/compared.html"
    assert report.main([*runs, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert "2 runs compared" in output.read_text()


def test_what_is_no_run_is_one_clear_line(tmp_path, capsys):
    assert report.main([str(tmp_path), "--output", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path} holds none of env.json")
    assert not (tmp_path / "report.html").exists()


def test_usage(capsys):
    assert report.main([]) == 2
    assert "RUN" in capsys.readouterr().err
