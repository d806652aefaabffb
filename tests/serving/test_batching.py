import threading
import time

import pytest

from serving.batching import Batcher, ClosedError, QueueFullError


class Held:
    """Answers with the doubled query; holds the first batch until it is released, and notes what was run together."""

    def __init__(self):
        self.began, self.release, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, queries):
        self.batches.append(list(queries))
        self.began.set()
        assert self.release.wait(30)
        if "bomb" in queries:
            raise RuntimeError("boom")
        return [ValueError(query) if query == "bad" else query * 2 for query in queries]


@pytest.fixture
def held():
    answer = Held()
    yield answer
    answer.release.set()


def start(held, **changes):
    """A batcher whose thread is busy with the query 0, so that what follows has to wait."""
    batcher = Batcher(held, **{"max_batch": 4, "max_wait": 0.0, "max_queue": 8, **changes})
    batcher.submit(0, 4)
    assert held.began.wait(30)
    return batcher


def test_what_waits_shares_batches_in_the_order_of_arrival(held):
    batcher = start(held)
    futures = [batcher.submit(query, 1) for query in range(1, 7)]
    held.release.set()
    assert [future.result(30) for future in futures] == [2, 4, 6, 8, 10, 12]
    assert held.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_batches_are_filled_by_size_and_larger_queries_run_alone(held):
    sizes = []
    batcher = start(held, observe=sizes.append)
    for query, size in (("a", 3), ("b", 1), ("c", 2), ("d", 5)):
        batcher.submit(query, size)
        if query == "c":
            held.release.set()
            batcher.call(lambda: None).result(30)
    batcher.close()
    assert held.batches == [[0], ["a", "b"], ["c"], ["d"]]
    assert sizes == [4, 4, 2, 5]


def test_the_queue_is_bounded_by_histories(held):
    batcher = start(held)
    batcher.submit("x", 7)
    with pytest.raises(QueueFullError):
        batcher.submit("y", 2)
    last = batcher.submit("z", 1)
    with pytest.raises(QueueFullError):
        batcher.call(print)
    assert batcher.waiting == 8
    held.release.set()
    assert last.result(30) == "zz"
    assert batcher.waiting == 0
    assert batcher.submit("y", 2).result(30) == "yy"


def test_a_bad_query_fails_alone(held):
    batcher = start(held)
    futures = [batcher.submit(query, 1) for query in ("a", "bomb", "bad", "b")]
    held.release.set()
    assert [futures[0].result(30), futures[3].result(30)] == ["aa", "bb"]
    assert isinstance(futures[1].exception(30), RuntimeError)
    assert isinstance(futures[2].exception(30), ValueError)
    assert batcher.submit("c", 1).result(30) == "cc"


def test_an_answer_too_few_is_an_error_and_no_hanging_client():
    batcher = Batcher(lambda queries: [], max_batch=4, max_wait=0.0, max_queue=8)
    assert isinstance(batcher.submit("a", 1).exception(30), ValueError)


def test_what_was_cancelled_in_time_is_not_run(held):
    batcher = start(held)
    futures = [batcher.submit(query, 1) for query in (1, 2, 3)]
    assert futures[1].cancel()
    held.release.set()
    batcher.close()
    assert held.batches == [[0], [1, 3]]
    assert batcher.waiting == 0


def test_calls_run_alone_and_in_their_turn(held):
    batcher = start(held)
    before = batcher.submit("a", 1)
    calls = []
    call = batcher.call(lambda: calls.append("called") or (before.done(), after.done()))
    after = batcher.submit("b", 1)
    failing = batcher.call(lambda: 1 // 0)
    held.release.set()
    assert call.result(30) == (True, False)
    assert isinstance(failing.exception(30), ZeroDivisionError)
    assert after.result(30) == "bb"
    assert held.batches == [[0], ["a"], ["b"]]
    assert calls == ["called"]


def test_closing_answers_what_was_accepted(held):
    batcher = start(held, max_wait=60.0)
    futures = [batcher.submit(query, 3) for query in (1, 2)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        time.sleep(0.001)
    with pytest.raises(ClosedError):
        batcher.submit(3, 1)
    held.release.set()
    closing.join(30)
    assert [future.result(0) for future in futures] == [2, 4]


def test_a_full_batch_does_not_wait_and_a_lone_query_not_long():
    batches = []
    batcher = Batcher(lambda queries: batches.append(queries) or queries, max_batch=2, max_wait=60.0, max_queue=8)
    futures = [batcher.submit(query, 1) for query in "ab"]
    assert [future.result(30) for future in futures] == ["a", "b"]
    batcher.close()
    batcher = Batcher(list, max_batch=2, max_wait=0.05, max_queue=8)
    began = time.monotonic()
    assert batcher.submit("a", 1).result(30) == "a"
    assert time.monotonic() - began > 0.04
    batcher.close()
    assert batches == [["a", "b"]]
