"""The processes of a run: which one this is, one writer among them, and what becomes of all when one is lost.

A collective in which a process is missing ends in an error after `PROCESS_TIMEOUT_SECONDS` (an environment variable;
ten minutes where it is not set). Where the main process works alone, which may take hours, the others wait for as long
as it lives and notice within a minute that it does not.
"""

import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed import DistError, Store
from torch.distributed.distributed_c10d import _get_default_store

from data.schemas import InputError
from training.heartbeat import Heartbeat, LostProcessError

TIMEOUT_VARIABLE = "PROCESS_TIMEOUT_SECONDS"
_TIMEOUT_SECONDS = 600.0
"""How long a process waits for the others in a collective, to which all come at nearly the same time."""

_SILENCE_SECONDS = 60.0
"""A main process that works alone and of which nothing is heard for so long has ended."""

_NOT_SUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
"""What `accelerate launch`, told by its arguments or its config file, asks a program for."""

_BROKEN = re.compile(r"gloo|nccl|pair closure|connection (closed|reset) by peer|broken pipe", re.IGNORECASE)
_PLACE_IN_SOURCE = re.compile(r"\[/\S+\]\s*")
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)

_alone = False
_num_waits = 0
_heartbeat: Heartbeat | None = None


def uses_cuda() -> bool:
    """Whether runs compute on CUDA: where there is any, unless `accelerate launch --cpu` started them."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def process_state() -> PartialState:
    """This process among those of the run, on CUDA or on the CPU, see `uses_cuda`.

    Without being told so, Accelerate starts no process group on machines without an accelerator: under torchrun each
    process would believe to be alone.

    Raises:
        InputError: if the launcher asks for what no model here needs, or has not started what it was asked for.
    """
    global _heartbeat
    if PartialState._shared_state == {}:
        check_launch(os.environ)
        PartialState(cpu=not uses_cuda(), timeout=timedelta(seconds=timeout_seconds(os.environ)))
    state = PartialState()
    if state.num_processes > 1 and _heartbeat is None:
        _heartbeat = Heartbeat(_get_default_store(), state.process_index, state.num_processes)
    return state


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` can ask for and this library does not do.

    Raises:
        InputError: for a way of sharding models, and for processes that were asked for and not started.
    """
    for variable, name in _NOT_SUPPORTED.items():
        if environment.get(variable, "").lower() in ("true", "1"):
            raise InputError(
                f"{name} was asked for ({variable}={environment[variable]}), but the models here fit on one device and "
                "train with DDP. Launch with torchrun, or with accelerate launch --multi_gpu; where its config file "
                "asks for it, give another with --config_file."
            )
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_PORT" in environment and not _has_rank(environment):
        raise InputError(
            "accelerate launch --cpu was asked for several processes and started one. Launch several on CPUs with "
            "torchrun --nproc_per_node N, and one without --num_processes."
        )


def _has_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or an MPI has told this process its number."""
    return any(name in environment for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))


def timeout_seconds(environment: Mapping[str, str]) -> float:
    """Limit of collectives; InputError where the environment names none that is possible."""
    text = environment.get(TIMEOUT_VARIABLE, str(_TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"the environment variable {TIMEOUT_VARIABLE} expected a positive number, got {text!r}.")
    return seconds


def on_main(action: Callable[[], object]) -> None:
    """Run an action on the main process while the others wait; an InputError there is raised on all of them.

    It may take hours. Inside the action, on_main just runs what it is given: nobody else takes part.

    Raises:
        LostProcessError: on the others, if the main one ends, stands still or fails otherwise.
    """
    global _num_waits
    state = process_state()
    if state.num_processes == 1 or _alone:
        action()
        return
    assert _heartbeat is not None
    _num_waits += 1
    key = f"on_main/{_num_waits}"
    if state.is_main_process:
        _tell_outcome(action, _heartbeat.store, key)
    else:
        silence = min(_SILENCE_SECONDS, timeout_seconds(os.environ))
        _raise_outcome(json.loads(_heartbeat.wait_for(key, 0, silence=silence)))


def _tell_outcome(action: Callable[[], object], store: Store, key: str) -> None:
    """Run an action, and say under a key how it ended."""
    global _alone
    outcome: dict[str, str] = {}
    _alone = True
    try:
        action()
    except InputError as error:
        outcome = {"refused": str(error)}
        raise
    except BaseException as error:
        outcome = {"failed": f"{type(error).__name__}: {error}"}
        raise
    finally:
        _alone = False
        store.set(key, json.dumps(outcome))


def _raise_outcome(outcome: dict[str, str]) -> None:
    if "refused" in outcome:
        raise InputError(outcome["refused"])
    if "failed" in outcome:
        raise LostProcessError(f"process 0, which it waited for, has failed: {outcome['failed']}")


def lost_process(error: BaseException) -> str | None:
    """What to tell a person of an error that another process has caused by ending or standing still; None of others.

    May listen to the others for some seconds, so that it can say which one it is.
    """
    if _heartbeat is None:
        return None
    if isinstance(error, LostProcessError):
        what = str(error)
    elif isinstance(error, DistError) or (isinstance(error, RuntimeError) and _BROKEN.search(str(error))):
        what = _PLACE_IN_SOURCE.sub("", str(error)).splitlines()[0].partition(". ")[0]
        with _unterminated():
            what = f"{_whom(_heartbeat, what)} ({what})"
    else:
        return None
    state = PartialState()
    return (
        f"process {state.process_index} of {state.num_processes} cannot go on: {what}. The messages of the others say "
        "why, if they could still write any. Start all of them again, a training with --resume auto."
    )


def _whom(heartbeat: Heartbeat, what: str) -> str:
    try:
        silent = heartbeat.silent()
    except LostProcessError as error:
        return str(error)
    if silent:
        return f"nothing is heard of process {', '.join(map(str, silent))}, which has ended or stands still"
    if _TIMED_OUT.search(what):
        seconds = timeout_seconds(os.environ)
        return f"not all processes came to the same call within {seconds:.0f} s ({TIMEOUT_VARIABLE}), though all live"
    return "one of the others has left, or the network has failed"


@contextmanager
def _unterminated() -> Iterator[None]:
    """A launcher that has noticed the loss terminates the others, which have something to say before they go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: Any = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def leave_together() -> None:
    """End a run of several processes once every one has come so far; one that leaves early breaks the others' calls.

    Does not return then: the interpreter's own way out meets threads of the process group, and aborts one run in
    twenty that has done all its work. In a run of one process it does nothing.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    state.wait_for_everyone()
    assert _heartbeat is not None
    _heartbeat.stop()
    state.destroy_process_group()
    _end(0)


def leave_after_error(code: int) -> int:
    """End one of several processes with a code, at once, as `leave_together` does; in a run of one, return it."""
    if _heartbeat is not None:
        _end(code)
    return code


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
