"""What a program runs on: the commit of this source tree, the hardware, the versions."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from training.processes import process_state

_PACKAGES = (
    "torch",
    "triton",
    "accelerate",
    "gin-config",
    "numpy",
    "safetensors",
    "einops",
    "polars",
    "wandb",
    "tensorboard",
)


def describe_environment() -> dict[str, Any]:
    """Commit, hardware and versions of Python and the packages in use, as JSON can hold them."""
    return {
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "num_processes": process_state().num_processes,
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of this source tree, with "+changes" where tracked files differ from it; None without git."""
    source = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
