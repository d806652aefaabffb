"""Compiles every kernel that the shipped configs and the kernels' own tests launch, for sm_80 and sm_90, with no GPU.

    python -m tests.kernels.ahead_of_time                   # a table of registers, spills and shared memory
    python -m tests.kernels.ahead_of_time --only attention  # kernels whose name contains it
    python -m tests.kernels.ahead_of_time --json FILE       # for test_ahead_of_time.py

The public ops run on CPU tensors while Triton's launcher is replaced: it notes what Triton would have compiled, by
Triton's own rules, and starts nothing. Outputs stay zeros. The interpreter must be off (no TRITON_INTERPRET).
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import ops.triton
from ops import backend as dispatch
from tests.kernels import library_ops
from tests.kernels.shipped import DTYPES, Workload, workloads

CAPABILITIES = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = ("mma.sync", "wgmma.mma_async")


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would compile it for one kind of device.

    Attributes:
        kernel: the JITFunction.
        source: of the triton compiler.
        options: of the triton compiler.
        capability: 90 for sm_90.
        first_user: the workload in which it was seen first.
    """

    kernel: JITFunction
    source: ASTSource
    options: Any
    capability: int
    first_user: str

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.__name__

    @property
    def kind(self) -> tuple[str, ...]:
        """Name and dtypes of the pointers."""
        return (self.name, *self.dtypes)

    @property
    def dtypes(self) -> list[str]:
        """Of the pointers, sorted."""
        return sorted({kind[1:] for kind in _flat(self.source.signature.values()) if kind.startswith("*")})

    @property
    def constants(self) -> dict[str, str]:
        """Names and values of the compile-time constants."""
        return {self.kernel.arg_names[path[0]]: _short(value) for path, value in self.source.constants.items()}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch; `error` says why it made nothing.

    Attributes:
        name: of the kernel.
        capability: 90 for sm_90.
        dtypes: of the pointers, sorted.
        constants: compile-time constants.
        num_warps, num_stages: as launched.
        registers: per thread.
        spilled: bytes of stack per thread.
        shared: bytes of shared memory per block.
        tensor_cores: instructions found.
        tf32: whether products are rounded to tf32.
        seconds: that compiling took.
        first_user: the workload in which the launch was seen first.
        error: of the compiler.
    """

    name: str
    capability: int
    dtypes: list[str]
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    first_user: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_cores: tuple[str, ...] = ()
    tf32: bool = False
    seconds: float = 0.0
    error: str = ""


def kernel_names() -> set[str]:
    """Every kernel of ops/triton."""
    names = set()
    for module in kernel_modules():
        for name, value in vars(module).items():
            own = isinstance(value, JITFunction) and value.__module__ == module.__name__
            if own and name.endswith("_kernel"):
                names.add(name)
    return names


def kernel_modules() -> list[Any]:
    """The modules of ops/triton."""
    found = pkgutil.iter_modules(ops.triton.__path__, "ops.triton.")
    return [importlib.import_module(module.name) for module in found]


class Recorder:
    """Stands in for Triton's launcher."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}
        self.user = ""
        self._backends = {target: make_backend(GPUTarget("cuda", target, 32)) for target in CAPABILITIES}
        self._binders: dict[str, Any] = {}

    def run(self, kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Note a launch; the same work that Triton does up to its compiler."""
        name = kernel.__name__
        if name not in self._binders:
            any_backend = self._backends[CAPABILITIES[0]]
            self._binders[name] = create_function_from_signature(kernel.signature, kernel.params, any_backend)
        bound, specialization, rest = self._binders[name](*arguments, **options)
        grid = grid(bound) if callable(grid) else grid
        if any(size < 1 or not isinstance(size, int) for size in grid):
            raise AssertionError(f"{name} is launched with the grid {grid}")
        for capability, target in self._backends.items():
            parsed, signature, constants, attributes = kernel._pack_args(target, options, bound, specialization, rest)
            key = str((capability, name, signature, constants, attributes, parsed))
            if key not in self.launches:
                source = ASTSource(kernel, signature, constants, attributes)
                self.launches[key] = Launch(kernel, source, parsed, capability, self.user)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within the block ops on CPU tensors take their Triton twins, whose launches are noted and not started."""

    def run(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
        recorder.run(kernel, *arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(no_products())
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(dispatch, "_decide", return_value=True))
        stack.enter_context(mock.patch.object(torch, "empty", torch.zeros))
        stack.enter_context(mock.patch.object(torch, "empty_like", torch.zeros_like))
        stack.enter_context(mock.patch.object(Tensor, "new_empty", Tensor.new_zeros))
        yield


def record() -> tuple[list[Launch], list[str]]:
    """Launches of the shipped configs, and of the tests where those lack a kernel or a dtype; and what went wrong."""
    shipped, tested, failures = Recorder(), Recorder(), []
    torch.manual_seed(0)
    for recorder, found in ((shipped, workloads()), (tested, check_workloads())):
        with recording(recorder):
            for workload in found:
                recorder.user = workload.name
                try:
                    workload.run()
                except Exception:
                    failures.append(f"{workload.name}: {traceback.format_exc()}")
    covered = {launch.kind for launch in shipped.launches.values()}
    more = [launch for launch in tested.launches.values() if launch.kind not in covered]
    return [*shipped.launches.values(), *more], failures


@contextmanager
def no_products() -> Iterator[None]:
    """Matrix products are zeros: what a processor would spend most of its time on, and nobody reads."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):
        library.impl("mm", lambda a, b: a.new_zeros(a.shape[0], b.shape[1]), "CPU")
        library.impl("bmm", lambda a, b: a.new_zeros(*a.shape[:2], b.shape[2]), "CPU")
    try:
        yield
    finally:
        library._destroy()


def check_workloads() -> Iterator[Workload]:
    """The comparisons in the tests of all kernels, in every precision."""
    for name in library_ops.kernel_modules():
        for check, dtype in itertools.product(library_ops.checks_of(name), DTYPES):
            where = f"{check.__name__} of tests/kernels/test_{name}.py, {str(dtype).removeprefix('torch.')}"
            yield Workload(where, partial(_run_check, check, dtype))


def _run_check(check: Any, dtype: torch.dtype) -> None:
    # Nothing is computed, so a comparison must fail, and only what is launched before it is seen.
    with suppress(AssertionError):
        check(torch.device("cpu"), dtype)


def compile_launch(launch: Launch) -> Compiled:
    """Compile, and read what the machine code needs."""
    about: dict[str, Any] = {
        "name": launch.name,
        "capability": launch.capability,
        "dtypes": launch.dtypes,
        "constants": launch.constants,
        "num_warps": launch.options.num_warps,
        "num_stages": launch.options.num_stages,
        "first_user": launch.first_user,
    }
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            launch.source, target=GPUTarget("cuda", launch.capability, 32), options=launch.options.__dict__
        )
    except Exception as error:
        return Compiled(**about, error=f"{type(error).__name__}: {error}"[-3000:])
    ptx = compiled.asm["ptx"]
    registers, stack, local = _resources(compiled.asm["cubin"])
    return Compiled(
        **about,
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        tensor_cores=tuple(name for name in TENSOR_CORES if name in ptx),
        tf32=".tf32" in ptx,
        seconds=time.perf_counter() - start,
    )


def _resources(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise AssertionError(f"cuobjdump's output has no resource usage: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _flat(kinds: Iterable[Any]) -> Iterator[str]:
    for kind in kinds:
        if isinstance(kind, tuple | list):
            yield from _flat(kind)
        else:
            yield kind


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


_launches: list[Launch] = []


def _compile_numbered(number: int) -> Compiled:
    return compile_launch(_launches[number])


def compile_all(launches: list[Launch], processes: int) -> list[Compiled]:
    """Compile in processes that are forked, since launches cannot be sent."""
    _launches[:] = launches
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_numbered, range(len(launches))))


def _print_table(results: list[Compiled]) -> None:
    for found in results:
        kind = f"{found.name:38s} sm_{found.capability} {','.join(found.dtypes):22s}"
        launch = f"w{found.num_warps} s{found.num_stages}"
        needs = f"registers {found.registers:3d} spilled {found.spilled:4d} shared {found.shared:6d}"
        marks = f"{'tensor cores ' if found.tensor_cores else ''}{'tf32 ' if found.tf32 else ''}"
        constants = " ".join(f"{name}={value}" for name, value in found.constants.items())
        print(f"{kind} {launch} {needs} {found.seconds:5.1f} s {marks}{constants} [{found.first_user}] {found.error}")


def main() -> None:
    """Parse, record, compile, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--list", action="store_true", help="launches only, without compiling")
    parser.add_argument("--processes", type=int, default=min(8, len(os.sched_getaffinity(0))))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("kernels cannot be compiled with TRITON_INTERPRET=1")
    start = time.perf_counter()
    launches, failures = record()
    launches = [launch for launch in launches if arguments.only in launch.name]
    recorded = time.perf_counter() - start
    results = []
    if arguments.list:
        for launch in launches:
            print(launch.name, launch.capability, launch.constants, launch.first_user)
    else:
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            results = compile_all(launches, arguments.processes)
        _print_table(results)
    for failure in failures:
        print(failure, file=sys.stderr)
    total = time.perf_counter() - start
    print(f"{len(launches)} launches; recorded in {recorded:.0f} s, {total:.0f} s in all", file=sys.stderr)
    if arguments.json is not None:
        compiled = [asdict(found) for found in results]
        report = {"kernels": sorted(kernel_names()), "failures": failures, "compiled": compiled}
        arguments.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
