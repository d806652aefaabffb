"""What the processes of a run promise each other, said by each of two; tests start it under torchrun.

Each in turn stops, as a machine that hangs does: first the other one while the main one waits in a collective, then
the main one while the other waits for it.
"""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from data.schemas import InputError
from training.heartbeat import LostProcessError
from training.processes import leave_after_error, lost_process, on_main, process_state

state = process_state()
said: list[str] = []
pids = [torch.tensor(0), torch.tensor(0)]
torch.distributed.all_gather(pids, torch.tensor(os.getpid()))


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wake(rank: int) -> None:
    os.kill(int(pids[rank]), signal.SIGCONT)


def refuse() -> None:
    raise InputError("full disk")


def fail() -> None:
    raise KeyError("a fault")


def say_error_of(action: Callable[[], object]) -> None:
    """The error, and what people are told of it."""
    try:
        action()
    except Exception as error:
        said.append(f"{type(error).__name__} {error} -> {lost_process(error)}")


on_main(lambda: on_main(lambda: said.append("written")))
on_main(lambda: time.sleep(2.5))  # longer than the limit of collectives, which the test sets to 2 s
say_error_of(lambda: on_main(lambda: on_main(refuse)))
say_error_of(lambda: on_main(fail))

if state.is_main_process:
    say_error_of(lambda: torch.distributed.all_reduce(torch.ones(2)))
    wake(1)
else:
    stop()

if state.is_main_process:
    on_main(stop)
else:
    try:
        on_main(stop)
    except LostProcessError as error:
        said.append(str(lost_process(error)))
    wake(0)
# in one piece: print may mix the lines of two processes
sys.stdout.write("".join(f"{state.process_index}: {line}\n" for line in said))
sys.exit(leave_after_error(3))
