"""Sums of a trace, by hand: microseconds in, seconds out."""

import pytest

from training.trace_summary import OUTSIDE, REST, TraceSummary


def event(category: str, name: str, start: float, end: float, thread: int = 1, **args: int) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


STEP = [
    event("cpu_op", "inner", 50, 60),
    event("cpu_op", "outer", 40, 80),
    event("user_annotation", "data", 10, 30),
    event("user_annotation", "forward", 0, 100),
    event("user_annotation", "backward", 100, 200),
    event("cpu_op", "gradient", 110, 190, thread=2),
    event("cuda_runtime", "cudaLaunchKernel", 120, 130, thread=2, correlation=7),
    event("kernel", "matmul", 300, 350, thread=9, correlation=7),
    event("gpu_memcpy", "copy", 350, 351, thread=9, correlation=8),
    event("gpu_user_annotation", "backward", 300, 350, thread=9),
    event("user_annotation", "optimizer", 210, 230),
    event("user_annotation", "Optimizer.step", 212, 228),
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    {"ph": "i", "name": "Record Window End", "ts": 240},
]


def summary_of(*traces: list[dict[str, object]]) -> TraceSummary:
    summary = TraceSummary()
    for trace in traces:
        summary.add(trace)
    return summary


def test_time_of_a_phase_within_another_counts_once() -> None:
    seconds = summary_of(STEP).host_seconds
    assert seconds == pytest.approx({"data": 20e-6, "forward": 80e-6, "backward": 100e-6, "optimizer": 20e-6})


def test_operations_count_without_those_they_call() -> None:
    operations = summary_of(STEP).operations
    seconds = {name: total.seconds for name, total in operations.items()}
    expected = {"outer": 30e-6, "inner": 10e-6, "gradient": 70e-6, "cudaLaunchKernel": 10e-6, OUTSIDE: 180e-6}
    assert seconds == pytest.approx(expected)
    assert operations["inner"].calls == 1


def test_work_of_the_device_counts_where_it_was_launched() -> None:
    summary = summary_of(STEP)
    assert summary.device_seconds["backward"] == pytest.approx(50e-6)  # launched by a thread of autograd
    assert summary.device_seconds[REST] == pytest.approx(1e-6)  # launched by nothing in the trace
    assert summary.kernels["matmul"].seconds == pytest.approx(50e-6)
    assert "backward" not in summary.kernels


def test_traces_add_up() -> None:
    once, twice = summary_of(STEP), summary_of(STEP, STEP)
    assert twice.host_seconds["forward"] == pytest.approx(2 * once.host_seconds["forward"])
    assert twice.operations["outer"].calls == 2
    assert twice.kernels["matmul"].seconds == pytest.approx(2 * once.kernels["matmul"].seconds)
