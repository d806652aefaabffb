"""What the next steps need, made by a thread while the present step computes."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Calls a function of a step in one background thread, some steps ahead of the one that is asked for.

    Which steps are asked for changes nothing but the waiting: at any other than the next one, what was made ahead is
    dropped. An error of the function is raised where its step is asked for, and asking again calls it again. The
    thread starts with the first step and ends with the object; a forked process has a thread of its own.

    Args:
        make: the function. It must not hold the ReadAhead, which would then end only when garbage is collected.
        depth: steps made ahead; 0 calls the function as it is asked, without a thread.
    """

    def __init__(self, make: Callable[[int], T], depth: int) -> None:
        self._make = make
        self._depth = depth
        self._begin()

    def __call__(self, step: int) -> T:
        """The function's value at a step."""
        if self._depth == 0:
            return self._make(step)
        if self._process != os.getpid():  # threads do not survive a fork
            self._begin()
        wanted = range(step, step + self._depth + 1)
        for stale in [number for number in self._made if number not in wanted]:
            self._made.pop(stale).cancel()
        for number in wanted:
            if number not in self._made:
                self._made[number] = self._thread.submit(self._make, number)
        try:
            return self._made[step].result()
        finally:  # also when Ctrl-C ends the waiting
            del self._made[step]

    def _begin(self) -> None:
        """Nothing made, and a thread that starts when it gets work."""
        self._process = os.getpid()
        self._made: dict[int, Future[T]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead")
