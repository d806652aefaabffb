import threading
import time

import pytest

from data.schemas import InputError
from serving import processes
from serving.answers import Answer
from serving.jsonl import Problem
from serving.parts import open_part
from serving.processes import LostProcessError, Share, Watch, merge, wait_for_merge


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, Share(0, 1)), ({"RANK": "2", "WORLD_SIZE": "3"}, Share(2, 3)), ({"WORLD_SIZE": "2"}, Share(0, 2))],
)
def test_share_of_the_environment(environment, expected):
    assert Share.of(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "x"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "-1"}])
def test_a_share_that_cannot_be(environment):
    with pytest.raises(InputError, match="expected RANK below WORLD_SIZE in the environment, got RANK="):
        Share.of(environment)


def write_share(part, share, num_blocks):
    for index in range(num_blocks):
        if share.owns(index):
            problems = [Problem(index, "bad")] if index == 2 else []
            part.append(index, index, Answer(f"block {index}\n" * index, index, problems))
    part.finish(num_blocks)


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 7])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_blocks_are_merged_in_their_order(tmp_path, num_blocks, num_processes):
    output, ended = tmp_path / "out", []

    def other(rank):
        with open_part(output, rank, {"a": 1}, restart=False) as part:
            share = Share(rank, num_processes)
            write_share(part, share, num_blocks)
            wait_for_merge(part, Watch(part, share))
            ended.append(rank)

    threads = [threading.Thread(target=other, args=(rank,)) for rank in range(1, num_processes)]
    with open_part(output, 0, {"a": 1}, restart=False) as part:
        for thread in threads:
            thread.start()
        write_share(part, Share(0, num_processes), num_blocks)
        merged, tally, num_ranked = merge(part, Watch(part, Share(0, num_processes)))
        assert not ended
        part.publish(merged)
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(ended) == list(range(1, num_processes))
    assert output.read_text() == "".join(f"block {index}\n" * index for index in range(num_blocks))
    assert tally.num_histories == num_ranked == sum(range(num_blocks))
    assert tally.problems == ([Problem(2, "bad")] if num_blocks > 2 else [])
    assert list(tmp_path.iterdir()) == [output]


def test_a_dead_process_is_noticed(tmp_path, monkeypatch):
    output = tmp_path / "out"

    def other():
        with open_part(output, 1, {"a": 1}, restart=False) as part:
            part.append(1, 1, Answer("block 1\n", 1, []))  # and finishes nothing
            while not watch.has_begun(1):
                time.sleep(0.01)

    thread = threading.Thread(target=other)
    with open_part(output, 0, {"a": 1}, restart=False) as part:
        watch = Watch(part, Share(0, 2))
        thread.start()
        write_share(part, watch.share, 3)
        with pytest.raises(LostProcessError, match=r"process 1 has ended early\. Run the same again to go on"):
            merge(part, watch)
        thread.join()
        monkeypatch.setattr(processes, "START_PATIENCE", 0.2)
        with pytest.raises(LostProcessError, match="process 1 has not begun"):
            merge(part, Watch(part, Share(0, 2)))


def test_a_standing_process_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STALL_PATIENCE", 0.3)
    with open_part(tmp_path / "out", 0, {}, restart=False) as part, open_part(tmp_path / "out", 1, {}, restart=False):
        part.finish(0)
        with pytest.raises(LostProcessError, match="process 1 has finished no block for"):
            merge(part, Watch(part, Share(0, 2)))


def test_a_process_that_was_asked_for_something_else(tmp_path):
    with (
        open_part(tmp_path / "out", 0, {"top_k": 1}, restart=False) as part,
        open_part(tmp_path / "out", 1, {"top_k": 2}, restart=False) as other,
    ):
        part.finish(0)
        other.finish(0)
        with pytest.raises(InputError, match=r"process 1 was asked for something else: .*2"):
            merge(part, Watch(part, Share(0, 2)))


def test_the_others_notice_the_death_of_the_first(tmp_path):
    output = tmp_path / "out"

    def first():
        with open_part(output, 0, {}, restart=False) as part:
            part.append(0, 1, Answer("a\n", 1, []))
            while not watch.has_begun(0):
                time.sleep(0.01)

    thread = threading.Thread(target=first)
    with open_part(output, 1, {}, restart=False) as part:
        watch = Watch(part, Share(1, 2))
        thread.start()
        part.finish(1)
        with pytest.raises(LostProcessError, match="process 0 has ended early"):
            wait_for_merge(part, watch)
        thread.join()
