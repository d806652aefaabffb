import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data.files
import recommend
from data.schemas import InputError
from modules.recommender import Recommender
from serving.answers import Answerer
from serving.parts import MAX_SHOWN_PROBLEMS
from tests.modules.tiny_artifact import save_tiny_artifact, save_tiny_liger, save_tiny_sasrec
from tests.serving import recommend_process

REPOSITORY = Path(recommend.__file__).parent


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_tiny_artifact(folder / "model")
    return str(folder)


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("liger")
    save_tiny_liger(folder / "model")
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
        assert sorted(line) == ["complete", "items", "user"]
        assert line["complete"] is True
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
    assert reported[0].startswith("warning: skipped 1 item keys")
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in reported[1:6]] == ["2", "3", "4", "5", "6"]
    assert "not JSON" in reported[1]
    assert reported[2].endswith("the history is empty")
    assert 'expected {"user": ..., "history": [item keys as strings, ...]}' in reported[3]
    assert reported[4].endswith("no item of the history is in the catalogue")
    assert reported[6].endswith("skipped 5 of 7 lines")
    assert reported[7].startswith("2 histories in ")
    assert reported[7].endswith(" histories/s")
    assert len(reported) == 8


def test_many_bad_lines_are_counted(run_folder, lines, capsys):
    assert recommend.main([run_folder, "--input", lines(*["{\n"] * 25, request("u", "item-1"))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == MAX_SHOWN_PROBLEMS + 2


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

    monkeypatch.setattr(Answerer, "answer_block", crash)
    arguments = ["--input", lines(request("u", "item-1")), "--format", "json", "--output", str(output)]
    assert recommend.main([run_folder, *arguments]) == 1
    assert "boom" in capsys.readouterr().err
    assert output.read_text() == "older\n"
    assert len([path for path in tmp_path.iterdir() if "out" in path.name]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "x", "y"], "no item that the catalogue knows; got 2 unknown keys: x, y"),
        (["--input", "absent.jsonl"], "cannot read absent.jsonl: there is no such file"),
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


def test_devices_and_files_that_are_read_are_not_replaced(run_folder, lines, tmp_path, capsys):
    (tmp_path / "deny").write_text("item-2\n")
    os.mkfifo(tmp_path / "pipe")
    path = lines(request("u", "item-1"))
    before = Path(path).read_bytes()
    arguments = [run_folder, "--input", path, "--deny", str(tmp_path / "deny"), "--output"]
    assert recommend.main([*arguments, str(tmp_path / "pipe")]) == 2
    assert capsys.readouterr().err.endswith("pipe: it is no regular file. Choose another --output.\n")
    for output in (path, str(tmp_path / "deny")):
        assert recommend.main([*arguments, output]) == 2
        assert capsys.readouterr().err == f"error: cannot replace {output}: it is read, too. Choose another --output.\n"
    assert Path(path).read_bytes() == before
    assert (tmp_path / "pipe").is_fifo()


def test_a_new_folder_for_the_output_is_made(run_folder, tmp_path):
    output = tmp_path / "new" / "out.txt"
    assert recommend.main([run_folder, "--history", "item-1", "--output", str(output)]) == 0
    assert output.read_text().startswith("History")


def test_a_disk_that_fails_is_one_line(run_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.files, "write_synced", full)
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


def many_lines(lines, number):
    """Requests of many users, one in ten of them malformed."""
    items = random.Random(1)
    return lines(
        *(
            "{\n" if user % 10 == 3 else request(f"u{user}", *(f"item-{items.randrange(12)}" for _ in range(3)))
            for user in range(number)
        )
    )


@pytest.fixture
def one_thread():
    """As the processes that are compared have: with another number of threads the last digits of scores differ."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def uninterrupted(one_thread, run_folder, lines, tmp_path, capsys):
    """An input of 60 lines, the arguments of its run but for the output, and what one run writes."""
    arguments = [run_folder, "--input", many_lines(lines, 60), "--format", "json", "--top-k", "3", "--batch-size", "4"]
    arguments += ["--device", "cpu"]
    assert recommend.main([*arguments, "--output", str(tmp_path / "expected")]) == 2
    capsys.readouterr()
    return arguments, (tmp_path / "expected").read_bytes()


def stop_after(monkeypatch, num_blocks):
    """Ctrl-C in the middle of a block."""
    answer, count = Answerer.answer_block, 0

    def counted(self, block):
        nonlocal count
        count += 1
        if count > num_blocks:
            raise KeyboardInterrupt
        return answer(self, block)

    monkeypatch.setattr(Answerer, "answer_block", counted)


def test_a_stopped_run_goes_on_and_nothing_is_ranked_twice(uninterrupted, tmp_path, monkeypatch, capsys):
    arguments, expected = uninterrupted
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 9)
        assert recommend.main([*arguments, "--output", str(output)]) == 130
    assert not output.exists()
    assert recommend.main([*arguments, "--batch-size", "5", "--output", str(output)]) == 2
    assert "batch_size was 4, now 5. Ask for the same" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        assert recommend.main([*arguments, "--output", str(output)]) == 2
    assert output.read_bytes() == expected
    reported = capsys.readouterr().err.splitlines()
    assert reported[0] == f"going on behind line 36 of {arguments[2]}"
    assert [line.split(":")[1] for line in reported[1:7]] == ["4", "14", "24", "34", "44", "54"]
    assert reported[7].endswith("skipped 6 of 60 lines")
    assert reported[8].startswith("22 histories in ")
    assert reported[8].endswith("; 32 were there already")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_a_run_goes_on_only_in_its_mode(liger, lines, tmp_path, monkeypatch, capsys):
    """Parts that an earlier version of the library wrote name no mode: they are generative."""
    arguments = [liger, "--input", many_lines(lines, 20), "--format", "json", "--batch-size", "4", "--device", "cpu"]
    output, told = tmp_path / "out", tmp_path / ".out.part" / "0.json"

    def stopped(mode):
        with monkeypatch.context() as patched:
            stop_after(patched, 2)
            return recommend.main([*arguments, "--mode", mode, "--output", str(output)])

    def changed_line():
        return next(line for line in capsys.readouterr().err.splitlines() if "was asked for something else" in line)

    assert stopped("dense") == 130
    assert recommend.main([*arguments, "--output", str(output)]) == 2
    assert "ranker was 'dense', now 'generative'. Ask for the same" in changed_line()
    assert recommend.main([*arguments, "--mode", "dense", "--output", str(output)]) == 2  # two lines are of no use
    assert "going on behind line 8" in capsys.readouterr().err
    assert stopped("generative") == 130
    earlier = json.loads(told.read_text())
    assert earlier.pop("ranker") == "generative"
    told.write_text(json.dumps(earlier))
    assert recommend.main([*arguments, "--mode", "hybrid@4", "--output", str(output)]) == 2
    assert "ranker was 'generative', now 'hybrid@4'" in changed_line()
    assert recommend.main([*arguments, "--output", str(output)]) == 2
    assert "going on behind line 8" in capsys.readouterr().err


def test_modes_of_one_model(liger, capsys):
    def lists(*arguments):
        assert recommend.main([liger, "--history", "item-1", "--format", "json", *arguments]) == 0
        return [item["item_key"] for item in json.loads(capsys.readouterr().out)["items"]]

    generative, dense = lists(), lists("--mode", "dense")
    assert dense != generative == lists("--mode", "generative")
    hybrid = lists("--mode", "hybrid@4")
    assert {"item-9", "item-10", "item-11"} <= set(hybrid)  # all that are cold, and at most four beams
    assert len(hybrid) <= 7
    assert [key for key in lists("--mode", "hybrid@all", "--top-k", "12") if key in hybrid] == hybrid


def test_a_model_without_semantic_ids_recommends(tmp_path, lines, capsys):
    save_tiny_sasrec(tmp_path / "model")
    output = tmp_path / "out"
    arguments = [str(tmp_path), "--input", lines(request("u", "item-1")), "--format", "json", "--output", str(output)]
    assert recommend.main([*arguments, "--device", "cpu"]) == 0
    assert len(json.loads(output.read_text())["items"]) == 10
    assert recommend.main([str(tmp_path), "--history", "item-1", "item-2"]) == 0
    assert capsys.readouterr().out.count("item-") >= 10


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("run_folder", ["--mode", "dense"], "dense retrieval needs a model with a dense head"),
        ("liger", ["--mode", "hybrid@50"], "hybrid@50 takes the first 50 of only 5 beams. Give --beam-width 50"),
        ("liger", ["--mode", ""], "unknown retrieval mode ''; valid modes: generative, dense, hybrid"),
    ],
)
def test_modes_that_a_model_has_not_are_one_line_and_exit_code_2(model, arguments, message, request, capsys):
    assert recommend.main([request.getfixturevalue(model), "--history", "item-1", *arguments]) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err.count("\n")) == ("", 1)
    assert message in streams.err


def test_restart_begins_anew(uninterrupted, tmp_path, monkeypatch, capsys):
    arguments, _ = uninterrupted
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 9)
        recommend.main([*arguments, "--output", str(output)])
    assert recommend.main([*arguments, "--top-k", "1", "--restart", "--output", str(output)]) == 2
    assert {len(json.loads(line)["items"]) for line in output.read_text().splitlines()} == {1}
    assert "going on" not in capsys.readouterr().err


def test_a_mistake_before_the_first_block_binds_nobody(uninterrupted, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise InputError("the model returned NaN")

    arguments, _ = uninterrupted
    output = tmp_path / "out"
    monkeypatch.setattr(Recommender, "recommend", broken)
    assert recommend.main([*arguments, "--output", str(output)]) == 2
    assert [path for path in tmp_path.iterdir() if "out" in path.name] == []


def num_whole_blocks(output):
    return sum(path.read_bytes().count(b"\n") for path in output.parent.glob(f".{output.name}.part/*.blocks"))


def killed(process, output, num_blocks, delay):
    """Kill -9 some time after so many blocks were written; whether that was before the end."""
    while process.is_alive() and num_whole_blocks(output) < num_blocks:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -9


def test_killed_at_random_moments_the_output_is_that_of_one_run(uninterrupted, tmp_path):
    arguments, expected = uninterrupted
    output, moments = tmp_path / "out", random.Random(2)
    arguments = [*arguments, "--output", str(output)]
    kills = sum(
        killed(recommend_process.start(*arguments), output, num_blocks, moments.random() / 50)
        for num_blocks in (1, 5, 9, 14)
    )
    last = recommend_process.start(*arguments)
    last.join()
    assert last.exitcode == 2  # for the malformed lines
    assert output.read_bytes() == expected
    assert kills >= 2
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_two_processes_write_what_one_does_also_after_one_of_them_was_killed(uninterrupted, tmp_path):
    arguments, expected = uninterrupted
    output = tmp_path / "out"

    def start_both():
        return [
            recommend_process.start(*arguments, "--output", str(output), RANK=rank, WORLD_SIZE="2") for rank in "01"
        ]

    first, second = start_both()
    blocks = [tmp_path / f".out.part/{rank}.blocks" for rank in "01"]
    while not blocks[1].exists():
        time.sleep(0.001)
    os.kill(second.pid, signal.SIGSTOP)  # the first one sees it at work, and then no more
    while not blocks[0].exists():
        time.sleep(0.001)
    time.sleep(0.5)
    assert killed(second, output, 0, 0)
    first.join()
    assert first.exitcode == 1
    assert not output.exists()
    processes = start_both()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [2, 0]
    assert output.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.slow
def test_under_torchrun(uninterrupted, tmp_path):
    arguments, expected = uninterrupted
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "recommend.py", *arguments, "--output", str(tmp_path / "out")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, done.stderr  # the launcher's answer to our 2
    assert "skipped 6 of 60 lines" in done.stderr
    assert (tmp_path / "out").read_bytes() == expected


def test_several_processes_need_lines_and_an_output(run_folder, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recommend.main([run_folder, "--history", "item-1"]) == 2
    assert recommend.main([run_folder, "--input", lines(request("u", "item-1"))]) == 2
    assert capsys.readouterr().err.count("several processes share the lines of --input and write --output") == 2


def test_allow_and_deny_files(run_folder, lines, tmp_path, capsys):
    (tmp_path / "allow").write_text("item-1\nitem-2\nitem-3\nx\n")
    (tmp_path / "deny").write_text("item-2\n")
    path = lines(*(request(f"u{user}", "item-3") for user in range(3)))
    arguments = [run_folder, "--input", path, "--format", "json", "--batch-size", "1", "--exclude-seen"]
    filters = ["--allow", str(tmp_path / "allow"), "--deny", str(tmp_path / "deny")]
    assert recommend.main([*arguments, *filters]) == 0
    printed = capsys.readouterr()
    listed = [[item["item_key"] for item in json.loads(line)["items"]] for line in printed.out.splitlines()]
    assert listed == [["item-1"]] * 3
    assert printed.err.count("warning: skipped 1 item keys of allow") == 1
    assert recommend.main([*arguments, "--allow", str(tmp_path / "absent")]) == 2
    assert "one item key per line" in capsys.readouterr().err


def test_warnings_of_many_blocks_are_cut_short(run_folder, lines, capsys):
    path = lines(*(request(user, "item-1", f"x{user}") for user in range(20)))
    assert recommend.main([run_folder, "--input", path, "--batch-size", "1"]) == 0
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == recommend.MAX_SHOWN_WARNINGS + 2
    assert reported[-2] == "warning: more warnings are not shown"


def test_an_input_that_cannot_be_read_twice(run_folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    arguments = [run_folder, "--input", str(tmp_path / "pipe"), "--output", str(tmp_path / "out")]
    assert recommend.main(arguments) == 2
    assert "again after a restart: it is no regular file" in capsys.readouterr().err
