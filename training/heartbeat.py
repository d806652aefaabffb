"""Signs of life: every process of a run says once a second that it lives, so that the others know whom to wait for.

They meet in the store of the process group, which torchrun and `accelerate launch` keep outside the processes that
train, and never in a collective, in which one missing process holds up all.
"""

import atexit
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed import Store

_T = TypeVar("_T")

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
"""The longest pause between two looks for what is waited for; short waits are looked at ten times as often as long."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, stands still, or has failed at what this one waited for."""


class Heartbeat:
    """Beats from a thread until this process ends, however it ends, and hears the others.

    Args:
        store: of the process group.
        rank: of this process.
        num_processes: of the run.
    """

    def __init__(self, store: Any, rank: int, num_processes: int) -> None:
        # Connections of their own: one waits while another is used. Torch's annotations know no clone.
        self.store: Store = store.clone()
        self._beaten: Store = store.clone()
        self._rank = rank
        self._others = [other for other in range(num_processes) if other != rank]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread that the interpreter's end meets in the store would abort it

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()
        self._thread.join(timeout=10 * _BEAT_SECONDS)

    def wait_for(self, key: str, rank: int, *, silence: float) -> bytes:
        """What a process puts under a key of the store, however long it takes, while that process lives.

        Raises:
            LostProcessError: if nothing was heard of it for `silence` seconds in which this process ran.
        """
        began = looked = time.monotonic()
        silent, pulse = 0.0, self._pulse(rank)
        while not self._asked(rank, lambda: self.store.check([key])):
            now = time.monotonic()
            if now - looked > _BEAT_SECONDS:
                before, pulse = pulse, self._pulse(rank)
                # Of a long pause little counts: this process stood still itself, and the other one maybe with it.
                silent = silent + min(now - looked, 2 * _BEAT_SECONDS) if pulse == before else 0.0
                looked = now
            if silent > silence:
                raise LostProcessError(f"nothing was heard of process {rank}, which it waited for, in {silence:.0f} s")
            time.sleep(min(max((now - began) / 10, 0.001), _LOOK_SECONDS))
        return self._asked(rank, lambda: self.store.get(key))

    def silent(self) -> list[int]:
        """The processes of which nothing is heard for some seconds, from now on."""
        before = {rank: self._pulse(rank) for rank in self._others}
        time.sleep(3 * _BEAT_SECONDS)
        return [rank for rank in self._others if self._pulse(rank) == before[rank]]

    def _beat(self) -> None:
        for beat in itertools.count():
            try:
                self._beaten.set(_key(self._rank), str(beat))
            except RuntimeError:  # the store has ended: so has the run, and the others know
                return
            if self._ended.wait(_BEAT_SECONDS):
                return

    def _pulse(self, rank: int) -> bytes:
        """What a living process changes from one second to the next; nothing before its first beat."""
        key = _key(rank)
        return self._asked(rank, lambda: self.store.get(key) if self.store.check([key]) else b"")

    def _asked(self, rank: int, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except RuntimeError as error:  # a store that lived in process 0, or in a launcher that was killed
            raise LostProcessError(f"process {rank}, or the launcher, has ended") from error


def _key(rank: int) -> str:
    return f"alive/{rank}"
