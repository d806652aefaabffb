"""Where the time of a training goes: a trace for Perfetto, the top operations, and each phase's share.

After some steps of warm-up torch.profiler records the steps, a few at a time which are then summed up, so that a long
profile needs no more memory than a short one. CUDA graphs must be off: a replayed step has no phases.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.checks import require_at_least
from training.profile_report import profile_numbers, profile_text
from training.trace_summary import TraceSummary

WARMUP_STEPS = 5
"""Steps before the first that is profiled: they compile kernels and create the optimizer's state."""
TRACE = "trace.json"

_RECORDED_AT_ONCE = 10
"""Steps, each of some thousand operations; the first so many are the trace that is kept."""


class StepProfile:
    """Profiles steps of a training, and times what the loop does besides.

    A context manager around the training: `advance` is called after every step, warm-up included, and whatever is no
    part of a step runs within `aside`. On leaving, `TRACE`, profile.json and profile.txt are written.

    Args:
        folder: for these files; created.
        num_steps: that are profiled, after `WARMUP_STEPS` that are not.
        device: of the model.
        every: steps between two evaluations in a real training, and between other things that run within `aside`.

    Raises:
        InputError: for less than one step.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device, *, every: Mapping[str, int]) -> None:
        require_at_least(1, "StepProfile", num_steps=num_steps)
        self._folder = folder
        self._num_steps = num_steps
        self._device = device
        self._every = every
        self._step = -WARMUP_STEPS
        self._profiler: profile | None = None
        self._started, self._first = 0.0, 0
        self._recorded_steps, self._seconds = 0, 0.0
        self._summary = TraceSummary()
        self._aside: dict[str, float] = {}

    def __enter__(self) -> "StepProfile":
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / TRACE).unlink(missing_ok=True)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            self._drop_recording()
            return
        self._end_recording()
        (self._folder / "profile.json").write_text(json.dumps(self._numbers(), indent=2) + "\n", encoding="utf-8")
        (self._folder / "profile.txt").write_text(self.report() + "\n", encoding="utf-8")

    def advance(self) -> None:
        """One more step is done."""
        self._step += 1
        if self._step % _RECORDED_AT_ONCE == 0 or self._step == self._num_steps:
            self._end_recording()
        if self._profiler is None and -1 <= self._step < self._num_steps:
            self._begin_recording()

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time an evaluation or the like, by the clock alone: it may take millions of operations."""
        self._end_recording()
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self._aside[name] = time.perf_counter() - started

    def report(self) -> str:
        """Shares of the phases and top operations, for people."""
        text, trace = profile_text(self._numbers()), self._folder / TRACE
        return f"{text}\ntrace of the first of them, for ui.perfetto.dev: {trace}" if trace.exists() else text

    def _numbers(self) -> dict[str, object]:
        return profile_numbers(
            self._summary,
            num_steps=self._recorded_steps,
            seconds=self._seconds,
            aside=self._aside,
            every=self._every,
            on_device=self._device.type == "cuda",
        )

    def _begin_recording(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else some builds of torch write to stderr at every start
        on_device = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._wait()
        self._profiler = profile(activities=[ProfilerActivity.CPU, *on_device])
        self._profiler.start()
        self._started, self._first = time.perf_counter(), self._step

    def _end_recording(self) -> None:
        """Sum up what was recorded, if anything is; but not the last step of the warm-up, whose recording is slow."""
        self._wait()
        seconds, num_steps = time.perf_counter() - self._started, self._step - self._first
        profiler = self._drop_recording()
        if profiler is None or self._step <= 0 or num_steps == 0:
            return
        trace = self._folder / f".{TRACE}"
        profiler.export_chrome_trace(str(trace))
        self._summary.add(json.loads(trace.read_bytes())["traceEvents"])
        self._seconds += seconds
        self._recorded_steps += num_steps
        if (self._folder / TRACE).exists():
            trace.unlink()
        else:
            trace.rename(self._folder / TRACE)

    def _drop_recording(self) -> profile | None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler

    def _wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
