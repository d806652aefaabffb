"""What every benchmark shares: the envelope of a result, where it is written, and how times are summarised."""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from data.files import without_paths
from data.schemas import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

_PACKAGES = ("torch", "triton", "numpy", "polars", "transformers", "accelerate", "sentence-transformers")
_LAUNCH_CYCLES = 2_000_000
"""About a millisecond of a GPU: longer than launching any op takes."""


def device_name(device: str = "cpu") -> str:
    """Name of the folder for results: `cpu-amd-epyc-2-threads`, or the GPU's name such as `nvidia-h100`."""
    if device.startswith("cuda"):
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"cpu-{_cpu_model()}-{_num_cpus()}-threads")


def envelope(name: str, rows: Sequence[dict[str, Any]], *, device: str = "cpu") -> dict[str, Any]:
    """A result with the hardware, commit, versions, command and date that made it."""
    return {
        "name": name,
        "device": device_name(device),
        "commit": commit(),
        "versions": versions(),
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": list(rows),
    }


def write_result(
    name: str, rows: Sequence[dict[str, Any]], *, device: str = "cpu", quick: bool = False, results: Path = RESULTS
) -> Path:
    """Writes `{results}/{device}/{name}.json`; a quick run, `{name}-quick.json`, leaves the full one alone."""
    path = results / device_name(device) / f"{name}{'-quick' if quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(envelope(name, rows, device=device), indent=2) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """Short hash of the checkout, with `-dirty` where it has changes; `unknown` outside git."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that decide timings, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every timing benchmark takes; `begin` reads it."""
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if there is one")
    made.add_argument("--quick", action="store_true", help="few repeats, for development; kept apart from full results")
    made.add_argument("--threads", type=int, default=_num_cpus(), help="of PyTorch on the CPU")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where results are written")
    return made


def begin(arguments: argparse.Namespace) -> str:
    """Set the number of threads, and return the device to use: "cpu" or "cuda".

    Raises:
        InputError: if a GPU is asked for and there is none.
    """
    torch.set_num_threads(arguments.threads)
    found = torch.cuda.is_available()
    if arguments.device == "cuda" and not found:
        raise InputError("--device cuda: PyTorch finds no GPU here. Use --device auto, or a build of PyTorch for CUDA.")
    return "cuda" if found and arguments.device != "cpu" else "cpu"


def finish(name: str, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace, device: str) -> Path:
    """Print the table and write the result."""
    print_table(rows)
    path = write_result(name, rows, device=device, quick=arguments.quick, results=arguments.results)
    print("written to", path)
    return path


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(
    run: Callable[[], object], *, repeats: int, warmup: int = 3, device: str = "cpu", calls: int = 1
) -> list[float]:
    """Seconds per call by the host's clock, after some calls that are not timed.

    Args:
        run: what is timed.
        repeats: length of the result.
        warmup: calls before, which also compile.
        device: is idle before the clock starts and before it stops, so that launching counts.
        calls: made between two looks at the clock; one that waits for nothing may overlap with the next, as in a loop.
    """
    for _ in range(warmup):
        run()
    return [_wall_seconds(run, device, calls) for _ in range(repeats)]


def measure_on_device(run: Callable[[], object], *, repeats: int, warmup: int = 3) -> list[float]:
    """Seconds per call on the GPU alone, between two events.

    The device is kept busy while the host launches, so that launching does not count, as in a replayed CUDA graph.
    """
    for _ in range(warmup):
        run()
    return [_event_seconds(run) for _ in range(repeats)]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    device: str = "cpu",
    calls: int = 1,
    on_device: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every contender, timed in turn, so that whatever disturbs one disturbs all.

    Args:
        contenders: what is timed, by name.
        repeats: rounds.
        warmup: calls of each before.
        device: as in `measure`.
        calls: as in `measure`.
        on_device: on a GPU, by `measure_on_device` instead of `measure`.
    """
    for run in contenders.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            by_events = on_device and device.startswith("cuda")
            seconds[name].append(_event_seconds(run) if by_events else _wall_seconds(run, device, calls))
    return seconds


def _wall_seconds(run: Callable[[], object], device: str, calls: int) -> float:
    synchronize(device)
    start = perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (perf_counter() - start) / calls


def _event_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_LAUNCH_CYCLES)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@contextmanager
def peak_memory(result: dict[str, Any], device: str = "cpu") -> Iterator[None]:
    """Put the most memory that the block held, beyond what was held before it, into result["peak_mb"].

    On a GPU, tensors of PyTorch; on a CPU, resident memory of the process (Linux; nothing elsewhere).
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        result["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    elif Path("/proc/self/status").is_file():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _resident_mb("VmRSS")
        yield
        result["peak_mb"] = round(_resident_mb("VmHWM") - resident, 1)
    else:
        yield


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def ratios(rows: Sequence[dict[str, Any]], *, of: str, key: str = "median_ms") -> dict[str, float]:
    """How many times as much of `key` each other implementation takes as implementation `of`, by name."""
    values = {row["implementation"]: row[key] for row in rows if isinstance(row.get(key), int | float)}
    if of not in values:
        return {}
    return {name: round(value / values[of], 2) for name, value in values.items() if name != of}


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """`median_ms`, `p20_ms` and `p80_ms`."""
    median, p20, p80 = np.percentile(np.asarray(seconds) * 1000, [50, 20, 80])
    return {"median_ms": round(float(median), 4), "p20_ms": round(float(p20), 4), "p80_ms": round(float(p80), 4)}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows, with one column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def _command() -> str:
    """The command as a person types it, without paths of this machine."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = f"-m {spec.name.removesuffix('.__main__')}" if spec is not None else Path(sys.argv[0]).name
    return without_paths(" ".join(["python", script, *sys.argv[1:]]))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2] for line in lines if line.startswith("model name")), platform.machine())
    return re.sub(r"\((R|TM)\)|@.*|processor", "", model, flags=re.IGNORECASE).strip()


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
