"""The processes of a run: which one this is, and one writer among them."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data.schemas import InputError


def process_state() -> PartialState:
    """This process among those of the run, on CUDA where there is any and on the CPU elsewhere.

    Without being told so, Accelerate starts no process group on machines without an accelerator: under torchrun each
    process would believe to be alone.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def on_main(action: Callable[[], object]) -> None:
    """Run an action on the main process while the others wait; an InputError there is raised on all of them."""
    state = process_state()
    if state.num_processes == 1:
        action()
        return
    outcome: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except InputError as error:
            outcome = [str(error)]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise InputError(outcome[0])
