"""What every benchmark shares: the envelope of a result, where it is written, and how times are summarised."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

_PACKAGES = ("torch", "triton", "numpy", "polars", "transformers", "accelerate", "sentence-transformers")


def device_name(device: str = "cpu") -> str:
    """Name of the folder for results: `cpu-amd-epyc-2-threads`, or the GPU's name such as `nvidia-h100`."""
    if device.startswith("cuda"):
        import torch

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
    return found


def measure(run: Callable[[], object], *, repeats: int, warmup: int = 3) -> list[float]:
    """Seconds of each call on the CPU, after some that are not timed."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return seconds


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
    script = f"-m {spec.name}" if spec is not None else Path(sys.argv[0]).name
    return " ".join(["python", script, *sys.argv[1:]])


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
