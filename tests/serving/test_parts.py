import json
import os
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError
from serving import parts
from serving.answers import Answer
from serving.jsonl import Problem
from serving.parts import Tally, is_locked, open_part, parts_folder

BLOCKS = [("one\n", 1), ("", 0), ("two\nthree\n", 2), ("4\n", 1), ("five\n", 1)]
WHOLE = "".join(text for text, _ in BLOCKS).encode()


def write(part, blocks=BLOCKS):
    """The blocks that the part does not have yet, each 10 bytes of input long."""
    begin = 0 if part.last is None else part.last.index + 1
    assert part.last is None or part.last.input_end == 10 * begin
    for index in range(begin, len(blocks)):
        text, num_histories = blocks[index]
        problems = [Problem(index, "bad")] if num_histories == 0 else []
        part.append(index, 10 * (index + 1), Answer(text, num_histories, problems))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_a_kill_or_a_power_failure_leaves_the_next_run_completes(tmp_path_factory, data):
    output = tmp_path_factory.mktemp("parts") / "out"
    with open_part(output, 0, {"k": 1}, restart=False) as part:
        write(part)
        text, blocks = part.path("out"), part.path("blocks")
    for path in (blocks, text):  # half a line, half a block, or blocks whose text never reached the disk
        with path.open("r+b") as file:
            content = path.read_bytes()
            ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
            file.truncate(data.draw(st.integers(0, len(content)) | st.sampled_from(ends)))
    if data.draw(st.booleans()):
        with blocks.open("ab") as file:
            file.write(b"\0" * 20 + b"\n")
    with open_part(output, 0, {"k": 1}, restart=False) as part:
        write(part)
        assert part.path("out").read_bytes() == WHOLE
        assert [record.index for record in part.records(0)] == list(range(5))
        part.publish(part.path("out"))
    assert output.read_bytes() == WHOLE
    assert not parts_folder(output).exists()


def test_another_request_does_not_go_on(tmp_path):
    output = tmp_path / "out"
    with open_part(output, 0, {"top_k": 10, "format": "json"}, restart=False) as part:
        write(part)
    expected = r"asked for something else: top_k was 10, now 20. Ask for the same .* --restart to start anew"
    with (
        pytest.raises(InputError, match=expected),
        open_part(output, 0, {"top_k": 20, "format": "json"}, restart=False),
    ):
        pass
    with open_part(output, 0, {"top_k": 10, "format": "json"}, restart=False) as part:
        assert part.last.index == 4
    with open_part(output, 0, {"top_k": 20, "format": "json"}, restart=True) as part:
        assert part.last is None


def test_a_run_without_any_block_leaves_nothing_and_binds_nobody(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), open_part(output, 0, {"top_k": 99}, restart=False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    folder = parts_folder(output)
    folder.mkdir()
    (folder / "0.json").write_text(json.dumps({"top_k": 99}))  # as a kill leaves it
    (folder / "0.blocks").write_text("{")
    with open_part(output, 0, {"top_k": 5}, restart=False) as part:
        write(part)
        assert part.path("out").read_bytes() == WHOLE


def test_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LOCK_PATIENCE", 0.1)
    output = tmp_path / "out"
    with open_part(output, 0, {}, restart=False) as part:
        assert is_locked(part.path("lock"))
        with pytest.raises(InputError, match=f"another process is writing {output}"), \
                open_part(output, 0, {}, restart=True):  # fmt: skip
            pass
        with open_part(output, 1, {}, restart=False) as other:
            assert is_locked(other.path("lock"))
        assert not is_locked(other.path("lock"))
        write(part)
    assert not is_locked(part.path("lock"))


def test_a_run_that_ends_leaves_alone_what_the_next_one_begins(tmp_path):
    """The next one waits for the same output, and begins while the first, published, has not left yet."""
    output, published, begun, left = tmp_path / "out", threading.Event(), threading.Event(), threading.Event()

    def write_next():
        assert published.wait(30)
        with open_part(output, 0, {}, restart=False) as part:
            begun.set()
            assert left.wait(30)
            write(part)
            part.publish(part.path("out"))

    thread = threading.Thread(target=write_next)
    thread.start()
    with open_part(output, 0, {}, restart=False) as part:
        part.append(0, 10, Answer("first\n", 1, []))
        part.publish(part.path("out"))
        published.set()
        assert begun.wait(30)
    left.set()
    thread.join(30)
    assert output.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("num_removed", range(11))
def test_a_kill_while_the_parts_are_removed_binds_nobody(tmp_path, monkeypatch, num_removed):
    output, count, unlink = tmp_path / "out", 0, os.unlink

    def remove(*args, **options):
        nonlocal count
        count += 1
        if count > num_removed:
            raise KeyboardInterrupt
        unlink(*args, **options)

    with open_part(output, 1, {"k": 1}, restart=False) as other, open_part(output, 0, {"k": 1}, restart=False) as part:
        for one in (part, other):
            write(one)
            one.finish(5)
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(os, "unlink", remove)
            part.publish(part.path("out"))
    for rank in (1, 0):
        with open_part(output, rank, {"k": 2 if num_removed > 1 else 1}, restart=False) as part:
            write(part)
            assert part.path("out").read_bytes() == WHOLE
    part.discard()
    assert list(tmp_path.iterdir()) == [output]


def test_tally_keeps_the_first_few_problems():
    tally = Tally()
    for block in range(4):
        tally.add(2, 4, [Problem(4 * block + line, "bad") for line in range(4)])
    assert (tally.num_histories, tally.num_problems) == (8, 16)
    assert tally.problems == [Problem(line, "bad") for line in range(10)]
