import io
import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.schemas import InputError
from serving import jsonl
from serving.jsonl import (
    Problem,
    Request,
    check_input,
    parse_block,
    parse_request,
    read_blocks,
    read_item_keys,
    with_progress,
)

LINES = st.lists(st.binary(max_size=8).map(lambda line: line.replace(b"\n", b" ") + b"\n"), max_size=20)


@given(lines=LINES, cut=st.integers(0, 3), size=st.integers(1, 5), start=st.integers(0, 4))
def test_blocks_are_the_same_from_wherever_reading_begins(lines, cut, size, start):
    content = b"".join(lines)[: -cut or None]  # the last line may lack its end
    blocks = list(read_blocks(io.BytesIO(content), size))
    assert b"".join(line for block in blocks for line in block.lines) == content
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert all(len(block.lines) == size for block in blocks[:-1])
    assert [block.first_line for block in blocks] == [1 + size * index for index in range(len(blocks))]
    if start < len(blocks):
        stream = io.BytesIO(content)
        stream.seek(blocks[start].end)
        assert list(read_blocks(stream, size, first=start + 1)) == blocks[start + 1 :]


def test_a_line_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 40)
    long, short = b'{"history": ["' + b"x" * 100 + b'"]}\n', b'{"history": ["a"]}\n'
    (block,) = read_blocks(io.BytesIO(short + long + short), 8)
    assert [len(line) for line in block.lines] == [len(short), 40, len(short)]
    assert block.end == 2 * len(short) + len(long)
    requests, problems = parse_block(block)
    assert requests == [(1, Request(None, ["a"])), (3, Request(None, ["a"]))]
    assert problems == [Problem(2, "longer than 40 bytes")]


def test_lines_of_other_systems():
    content = b'\xef\xbb\xbf{"user": 1, "history": ["a"]}\r\n\r\n{"history": ["\xc3\xa4"], "more": 2}'
    (block,) = read_blocks(io.BytesIO(content), 8)
    assert parse_block(block) == ([(1, Request(1, ["a"])), (3, Request(None, ["ä"]))], [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"history": "a"}', "expected"),
        (b'{"history": [1]}', "expected"),
        (b"[]", "expected"),
        (b"null", "expected"),
        (rb'{"user": "\ud800", "history": []}', "the user cannot be written again"),
        (b'{"user": NaN, "history": []}', "the user cannot be written again"),
        (b'{"user": 1' + b"0" * 5000 + b', "history": []}', "not JSON"),
    ],
)
def test_lines_that_are_no_request(line, message):
    with pytest.raises(ValueError, match=message):
        parse_request(line)


@pytest.mark.parametrize(("user", "key"), [("u", "u"), (7, "7"), (None, None), ([1], None), ("", "")])
def test_users(user, key):
    assert parse_request(json.dumps({"user": user, "history": []}).encode()).user_key() == key


def test_item_keys_of_a_file(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_bytes("\ufeffa b\r\n\nc\n  \nä".encode())
    assert read_item_keys(path) == {"a b", "c", "ä"}
    assert read_item_keys(None) is None
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"it is not UTF-8\. Give a text file with one item key per line"):
        read_item_keys(path)
    with pytest.raises(InputError, match="No such file"):
        read_item_keys(tmp_path / "absent")


def test_inputs_that_cannot_be_read(tmp_path):
    check_input(None, read_again=True)
    with pytest.raises(InputError, match=r"there is no such file\. Give a file of JSON lines"):
        check_input(tmp_path / "absent", read_again=False)
    with pytest.raises(InputError, match="it is a folder"):
        check_input(tmp_path, read_again=False)
    os.mkfifo(tmp_path / "pipe")
    check_input(tmp_path / "pipe", read_again=False)
    with pytest.raises(InputError, match="again after a restart: it is no regular file"):
        check_input(tmp_path / "pipe", read_again=True)


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_for_whoever_watches(tmp_path, monkeypatch, capsys, shown):
    (tmp_path / "in").write_bytes(b"a\n" * 6)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with (tmp_path / "in").open("rb") as stream:
        blocks = list(read_blocks(stream, 4))
        stream.seek(0)
        assert list(with_progress(read_blocks(stream, 4), stream, shown=shown)) == blocks
    drawn = capsys.readouterr().err
    assert ("100%" in drawn) == ("6 lines" in drawn) == shown
