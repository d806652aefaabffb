"""Dynamic batching: requests that arrive together are answered together, by the one thread that owns the model."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class QueueFullError(Exception):
    """The queue is at its bound; the client may come back soon."""


class ClosedError(Exception):
    """The server is stopping and accepts nothing new."""


@dataclass(frozen=True, eq=False)
class _Job(Generic[Q]):
    """What waits in the queue: a query of some size, or a function that is called alone."""

    query: Q | None
    size: int
    function: Callable[[], Any] | None = None
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=monotonic)


class Batcher(Generic[Q, A]):
    """A bounded queue and the thread that empties it, in the order of arrival.

    A batch begins with the oldest job and takes what follows until it has `max_batch` histories; it is run as soon as
    it is full or its oldest job has waited `max_wait` seconds. Nothing but this thread touches the model, so neither
    answers nor changes of the catalogue need a lock.

    Args:
        answer: gives one answer per query, or, as a value, the exception that the query ends in. If it raises, the
            queries of the batch are tried one by one, so that a bad one fails alone.
        max_batch: histories per batch; a larger query is run alone.
        max_wait: seconds that the oldest job waits for company.
        max_queue: histories that may wait.
        observe: called with the number of histories of every batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A | Exception]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        observe: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._answer = answer
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._max_queue = max_queue
        self._observe = observe
        self._jobs: deque[_Job[Q]] = deque()
        self._waiting = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Histories in the queue."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted and run."""
        return self._thread.is_alive() and not self._closing

    def submit(self, query: Q, size: int) -> "Future[A]":
        """Queue a query of `size` histories; a future that is cancelled in time is not run.

        Raises:
            QueueFullError: if it would exceed the queue's bound.
            ClosedError: after `close`.
        """
        return self._put(_Job(query, size))

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Queue a function that is called alone, after what came before it and before what comes later.

        Raises:
            QueueFullError: if the queue is at its bound.
            ClosedError: after `close`.
        """
        return self._put(_Job(None, 1, function))

    def close(self) -> None:
        """Accept nothing more, run what was accepted, and wait for its end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _put(self, job: _Job[Q]) -> "Future[Any]":
        with self._changed:
            if self._closing:
                raise ClosedError
            if self._waiting + job.size > self._max_queue:
                raise QueueFullError
            self._jobs.append(job)
            self._waiting += job.size
            self._changed.notify()
        return job.future

    def _work(self) -> None:
        while batch := self._take():
            started = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if started:
                self._run(started)

    def _take(self) -> list[_Job[Q]]:
        """The next batch, once it is due; empty when the queue is closed and done."""
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            if self._jobs:
                due = self._jobs[0].arrived + self._max_wait
                while self._waiting < self._max_batch and not self._closing and (left := due - monotonic()) > 0:
                    self._changed.wait(left)
            batch: list[_Job[Q]] = []
            size = 0
            while self._jobs and (not batch or self._joins(self._jobs[0], batch, size)):
                batch.append(self._jobs.popleft())
                size += batch[-1].size
            self._waiting -= size
            return batch

    def _joins(self, job: _Job[Q], batch: list[_Job[Q]], size: int) -> bool:
        return job.function is None and batch[0].function is None and size + job.size <= self._max_batch

    def _run(self, batch: list[_Job[Q]]) -> None:
        """Give every job of a batch its result."""
        try:
            if batch[0].function is not None:
                outcomes: Sequence[Any] = [batch[0].function()]
            else:
                self._observe(sum(job.size for job in batch))
                outcomes = self._answer([job.query for job in batch])  # type: ignore[misc]
            pairs = list(zip(batch, outcomes, strict=True))
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                for job in batch:
                    self._run([job])
            return
        for job, outcome in pairs:
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
