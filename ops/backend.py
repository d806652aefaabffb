"""Which twin of an op runs: Triton kernels on CUDA devices, PyTorch elsewhere, or what the user asks for."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.schemas import InputError

BACKENDS = ("auto", "torch", "triton")
OLDEST_TRITON = (3, 6)

_F = TypeVar("_F", bound=Callable[..., Any])

_logger = logging.getLogger("ops")
_override: str | None = None


def _constant_when_compiled(function: _F) -> _F:
    """What `torch.compiler.assume_constant_result` does, without importing the compiler and, through it, Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Override `OPS_BACKEND` within a block; `name` is one of auto, torch, triton.

    It counts for the whole process: a backward pass, which may compute parts of its forward again, has other threads.

    Raises:
        InputError: for another name.
    """
    global _override
    previous, _override = _override, _known(name, "ops.use_backend")
    try:
        yield
    finally:
        _override = previous


def uses_triton(device_type: str) -> bool:
    """Whether ops on tensors of this device type ("cpu", "cuda", ...) run as Triton kernels.

    Raises:
        InputError: if Triton is asked for where it cannot run.
    """
    return _chosen(_override, device_type)


def uses_cpu_path(device_type: str, seed: Tensor | None) -> bool:
    """Whether the fast twin for processors runs, rather than the plain reference.

    It draws dropout from torch's generator, so a given seed asks for the reference; so does a compiler, which reads
    the plain twin better than hand-tuned code.
    """
    return device_type == "cpu" and seed is None and not torch.compiler.is_compiling()


def describe_backend(device_type: str) -> str:
    """For logs: which twins run on a device type, and why."""
    if uses_triton(device_type):
        return f"ops run as Triton {_triton_version()} kernels on {device_type}"
    problem = _triton_problem() if device_type == "cuda" and (_override or _from_environment()) == "auto" else None
    return f"ops run in PyTorch on {device_type}" + (f", since {problem}" if problem else "")


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on (float64 is left alone), else unchanged."""
    device = tensors[0].device.type
    return tuple(tensor.to(autocast_dtype(device, tensor.dtype)) for tensor in tensors)


def autocast_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products of tensors of `dtype`: autocast's where that is on (but float64 stays), else `dtype`."""
    if dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type)


@_constant_when_compiled
def say_once(message: str) -> None:
    """Log a warning, the first time only."""
    _warn(message)


@functools.cache
def _warn(message: str) -> None:
    _logger.warning(message)


@functools.cache
def _from_environment() -> str:
    return _known(os.environ.get("OPS_BACKEND", "auto"), "OPS_BACKEND")


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{where} expected one of {', '.join(BACKENDS)}, got {name!r}.")
    return name


@_constant_when_compiled
def _chosen(override: str | None, device_type: str) -> bool:
    """A compiler takes the answer as it is: it cannot trace caches and logging."""
    return _decide(override or _from_environment(), device_type)


@functools.cache
def _decide(name: str, device_type: str) -> bool:
    if name == "torch" or (name == "auto" and device_type != "cuda"):
        chosen = False
    elif (problem := _triton_problem()) is not None:
        if name == "triton":
            raise InputError(f"the triton backend was asked for, but {problem}. Or use OPS_BACKEND=auto.")
        _logger.warning("ops run in PyTorch on %s, slower than they could: %s.", device_type, problem)
        return False
    elif device_type == "cuda" or _interpreting():
        chosen = True
    else:
        raise InputError(
            f"the triton backend was asked for with tensors on {device_type}. Triton kernels need a CUDA device; "
            "on a CPU they run in Triton's slow interpreter, for tests, when TRITON_INTERPRET=1 is set before the "
            "start. Use OPS_BACKEND=auto."
        )
    _logger.info("ops run %s on %s", "as Triton kernels" if chosen else "in PyTorch", device_type)
    return chosen


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_problem() -> str | None:
    """Why Triton cannot be used here, with the remedy; None where it can."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    version = _triton_version()
    if version is None:
        return f"Triton is not installed: install triton>={oldest} (Linux only)"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {oldest}: upgrade torch, which brings its own"
    return None


def _triton_version() -> str | None:
    """Of the installed package, which nightly and ROCm builds of torch name otherwise; Triton is not imported."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
