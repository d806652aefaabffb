"""Two processes' signs of life in one process."""

import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

import training.heartbeat
from training.heartbeat import Heartbeat, LostProcessError


@pytest.fixture
def hearts(monkeypatch):
    """Of processes 0 and 1, which beat twenty times as fast; and the clock that they look at."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(training.heartbeat, "time", clock)
    monkeypatch.setattr(training.heartbeat, "_BEAT_SECONDS", 0.05)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [Heartbeat(store, rank, 2) for rank in range(2)]
    yield *made, clock
    for heart in made:
        heart.stop()


def test_a_wait_lasts_as_long_as_the_other_process_lives(hearts):
    main, other, _ = hearts
    threading.Timer(0.6, lambda: main.store.set("done", "yes")).start()
    assert other.wait_for("done", 0, silence=0.3) == b"yes"
    assert other.silent() == []
    main.stop()
    with pytest.raises(LostProcessError, match="nothing was heard of process 0, which it waited for, in 0 s"):
        other.wait_for("never", 0, silence=0.3)
    assert other.silent() == [0]


def test_standing_still_together_loses_nobody(hearts):
    """Ctrl-Z and fg, or a machine that slept: whoever wakes first must not take the others for dead."""
    main, other, clock = hearts
    main.stop()  # nothing of it is heard yet when the other one wakes
    woken = time.monotonic()
    clock.monotonic = lambda: time.monotonic() + (3600 if time.monotonic() > woken + 0.2 else 0)
    threading.Timer(0.5, lambda: main.store.set("done", "yes")).start()
    assert other.wait_for("done", 0, silence=2.0) == b"yes"
