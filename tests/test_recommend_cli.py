import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import recommend
from tests.modules.tiny_artifact import save_tiny_artifact

REPOSITORY = Path(recommend.__file__).parent


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_tiny_artifact(folder / "model")
    return str(folder)


@pytest.fixture
def lines(tmp_path):
    def write(*contents):
        path = tmp_path / "histories.jsonl"
        path.write_text("".join(content if isinstance(content, str) else json.dumps(content) for content in contents))
        return str(path)

    return write


def request(user, *history):
    return json.dumps({"user": user, "history": list(history)}) + "\n"


def test_table_of_one_history(run_folder, capsys):
    assert recommend.main([run_folder, "--history", "item-3", "item-11", "--top-k", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    history, ranked = printed.out.split("Recommended\n")
    assert history.splitlines()[0] == "History, oldest first"
    assert [line.split() for line in history.splitlines()[1:]] == [["Title", "3", "item-3"], ["item-11", "item-11"]]
    rows = [line.split() for line in ranked.splitlines() if line]
    assert [row[0] for row in rows] == ["1.", "2."]
    assert all(row[-2].startswith("item-") and float(row[-1]) < 0 for row in rows)


def test_json_lines_in_and_out(run_folder, lines, tmp_path):
    path = lines(request("u1", "item-1"), request(7, "item-2", "item-3"), "\n", '{"history": ["item-4"]}')
    output = tmp_path / "out.jsonl"
    arguments = [run_folder, "--input", path, "--format", "json", "--top-k", "3", "--output", str(output)]
    assert recommend.main([*arguments, "--batch-size", "2"]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["user"] for line in written] == ["u1", 7, None]
    for line in written:
        assert sorted(line) == ["items", "user"]
        assert [sorted(item) for item in line["items"]] == [["item_key", "score", "title"]] * 3
        scores = [item["score"] for item in line["items"]]
        assert scores == sorted(scores, reverse=True)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]


def test_json_of_one_history_on_the_terminal(run_folder, capsys):
    assert recommend.main([run_folder, "--history", "item-1", "--format", "json", "--exclude-seen", "-k", "12"]) == 2
    capsys.readouterr()
    assert (
        recommend.main([run_folder, "--history", "item-1", "--format", "json", "--exclude-seen", "--top-k", "12"]) == 0
    )
    items = json.loads(capsys.readouterr().out)["items"]
    assert len(items) == 11
    assert "item-1" not in [item["item_key"] for item in items]


def test_tables_of_several_users_name_the_user(run_folder, lines, capsys):
    assert recommend.main([run_folder, "--input", lines(request("u1", "item-1"), request("u2", "item-2"))]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("User")] == ["User u1", "User u2"]


def test_bad_lines_are_reported_by_number_and_the_rest_goes_on(run_folder, lines, tmp_path, capsys):
    path = lines(
        request("u1", "item-1"),
        "{broken\n",
        request("u3"),
        '["item-1"]\n',
        request("u5", "x", "y"),
        '{"history": [3]}\n',
        request("u7", "item-2", "x"),
    )
    output = tmp_path / "out.jsonl"
    assert recommend.main([run_folder, "--input", path, "--format", "json", "--output", str(output)]) == 2
    assert [json.loads(line)["user"] for line in output.read_text().splitlines()] == ["u1", "u7"]
    reported = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in reported[:5]] == ["2", "3", "4", "5", "6"]
    assert "not JSON" in reported[0]
    assert reported[1].endswith("the history is empty")
    assert 'expected {"user": ..., "history": [item keys as strings, ...]}' in reported[2]
    assert reported[3].endswith("no item of the history is in the catalogue")
    assert reported[5].endswith("skipped 5 of 7 lines")
    assert reported[6].startswith("warning: skipped 1 item keys")
    assert len(reported) == 7


def test_many_bad_lines_are_counted(run_folder, lines, capsys):
    assert recommend.main([run_folder, "--input", lines(*["{\n"] * 25, request("u", "item-1"))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == recommend.MAX_SHOWN_PROBLEMS + 1


def test_no_usable_line_writes_nothing(run_folder, lines, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("older\n")
    path = lines(request("u", "x"))
    assert recommend.main([run_folder, "--input", path, "--output", str(output)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {path} has no line that can be used")
    assert output.read_text() == "older\n"


def test_a_crash_leaves_the_older_output(run_folder, lines, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("older\n")

    def crash(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(recommend, "write_json", crash)
    arguments = ["--input", lines(request("u", "item-1")), "--format", "json", "--output", str(output)]
    assert recommend.main([run_folder, *arguments]) == 1
    assert "boom" in capsys.readouterr().err
    assert output.read_text() == "older\n"
    assert len([path for path in tmp_path.iterdir() if "out" in path.name]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "x", "y"], "no item that the catalogue knows; got 2 unknown keys: x, y"),
        (["--history", "item-1", "--top-k", "13"], "from 1 to 12, the size of the catalogue, got 13"),
        (["--input", "absent.jsonl"], "cannot read absent.jsonl"),
        (["--history", "item-1", "--output", "recommend.py/out"], "cannot write recommend.py/out: "),
        (["--history", "item-1", "--output", "tests"], "cannot write tests: it is a folder. Choose another --output"),
        (["--history", "item-1", "--device", "tpu9"], "'tpu9'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_folder, capsys, arguments, message):
    assert recommend.main([run_folder, *arguments]) == 2
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 1
    assert message in reported[0]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "out")
    assert recommend.main(["no/artifact", "--input", "absent.jsonl", "--output", output]) == 2
    assert f"cannot write {output}: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err


def test_a_new_folder_for_the_output_is_made(run_folder, tmp_path):
    output = tmp_path / "new" / "out.txt"
    assert recommend.main([run_folder, "--history", "item-1", "--output", str(output)]) == 0
    assert output.read_text().startswith("History")


def test_a_disk_that_fails_is_one_line(run_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recommend, "write_table", full)
    assert recommend.main([run_folder, "--history", "item-1", "--output", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: cannot write {tmp_path / 'out'}: the disk is full. Choose another --output.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_user_of_a_line_reaches_the_model(run_folder, lines, capsys):
    """A number means the same as its text; of the seven user tokens one is for unknown users."""

    def scores(*users):
        path = lines(*(json.dumps({"user": user, "history": ["item-1", "item-2"]}) + "\n" for user in users))
        assert recommend.main([run_folder, "--input", path, "--format", "json"]) == 0
        return [[item["score"] for item in json.loads(line)["items"]] for line in capsys.readouterr().out.splitlines()]

    by_number, by_text, without = scores(7, "7", None)
    assert by_number == pytest.approx(by_text)
    assert by_number != pytest.approx(without)
    assert len({tuple(np.round(row, 4)) for row in scores(*(f"u{user}" for user in range(40)))}) == 6


def test_no_artifact(tmp_path, capsys):
    assert recommend.main([str(tmp_path), "--history", "a"]) == 2
    assert "holds no model artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        ["run", "--history"],
        ["run", "--history", "a", "--input", "f"],
        ["run", "--history", "a", "--top-k", "0"],
    ],
)
def test_bad_usage(arguments, capsys):
    assert recommend.main(arguments) == 2
    assert "usage: recommend.py" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    began = time.monotonic()
    code = "import sys, recommend; code = recommend.main(['--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "RUN_OR_ARTIFACT" in done.stdout
    assert time.monotonic() - began < 10


def test_as_a_program(run_folder):
    done = subprocess.run(
        [sys.executable, "recommend.py", run_folder, "--history", "nothing"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: history 0 has no item")
    assert done.stderr.count("\n") == 1
