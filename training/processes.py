"""The processes of a run: which one this is, and one writer among them."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from data.schemas import InputError

_PATIENCE = timedelta(days=1)
"""How long processes wait for each other: the main one may prepare or evaluate for hours (torch's own is minutes)."""

_alone = False


def uses_cuda() -> bool:
    """Whether runs compute on CUDA: where there is any, unless `accelerate launch --cpu` started them."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def process_state() -> PartialState:
    """This process among those of the run, on CUDA or on the CPU, see `uses_cuda`.

    Without being told so, Accelerate starts no process group on machines without an accelerator: under torchrun each
    process would believe to be alone.
    """
    return PartialState(cpu=not uses_cuda(), timeout=_PATIENCE)


def on_main(action: Callable[[], object]) -> None:
    """Run an action on the main process while the others wait; an InputError there is raised on all of them.

    Inside the action, on_main just runs what it is given: nobody else takes part.
    """
    global _alone
    state = process_state()
    if state.num_processes == 1 or _alone:
        action()
        return
    outcome: list[str | None] = [None]
    if state.is_main_process:
        _alone = True
        try:
            action()
        except InputError as error:
            outcome = [str(error)]
        finally:
            _alone = False
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise InputError(outcome[0])


def leave_together() -> None:
    """End a run of several processes once every one has come so far; one that leaves early breaks the others' calls.

    Does not return then: the interpreter's own way out meets threads of the process group, and aborts one run in
    twenty that has done all its work. In a run of one process it does nothing.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
