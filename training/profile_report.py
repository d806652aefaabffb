"""A profile in numbers and in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from training.trace_summary import PHASES, REST, Total, TraceSummary

_NUM_LISTED = 15
_NAME_WIDTH = 60


def profile_numbers(
    summary: TraceSummary,
    *,
    num_steps: int,
    seconds: float,
    aside: Mapping[str, float],
    every: Mapping[str, int],
    on_device: bool,
) -> dict[str, Any]:
    """Milliseconds per step; what happens aside counts in every step with its part of the time.

    Args:
        summary: of the traces.
        num_steps: that they hold.
        seconds: that these took.
        aside: seconds of an evaluation and the like.
        every: steps between two of them.
        on_device: whether a device computes what the host launches.
    """
    per_step = 1000 / max(num_steps, 1)
    phases = {name: {"ms": per_step * summary.host_seconds[name]} for name in PHASES}
    phases[REST] = {"ms": max(per_step * (seconds - sum(summary.host_seconds.values())), 0.0)}
    if on_device:
        for name, phase in phases.items():
            phase["device_ms"] = per_step * summary.device_seconds[name]
    for name, once in aside.items():
        phases[name] = {"ms": 1000 * once / every[name], "once_ms": 1000 * once, "every": every[name]}
    whole = sum(phase["ms"] for phase in phases.values())
    for phase in phases.values():
        phase["share"] = phase["ms"] / whole if whole else 0.0
    return {
        "num_steps": num_steps,
        "step_ms": per_step * seconds,
        "phases": phases,
        "operations": _per_step(summary.operations, num_steps),
        "kernels": _per_step(summary.kernels, num_steps),
    }


def profile_text(numbers: Mapping[str, Any]) -> str:
    """What `profile_numbers` says, as tables."""
    if numbers["num_steps"] == 0:
        return "profile: training ended before the first step that was to be profiled."
    title = f"{numbers['num_steps']} steps profiled, {numbers['step_ms']:.2f} ms each, without CUDA graphs"
    lines = [title, *_phase_lines(numbers["phases"])]
    for name, heading in {"kernels": "kernels of the device", "operations": "operations of the host"}.items():
        if numbers[name]:
            lines += ["", *_operation_lines(f"{heading}, their own time", numbers[name], numbers["step_ms"])]
    return "\n".join(lines)


def _per_step(totals: Mapping[str, Total], num_steps: int) -> list[dict[str, Any]]:
    """The operations that take longest."""
    longest = sorted(totals.items(), key=lambda item: -item[1].seconds)[:_NUM_LISTED]
    return [
        {"name": name, "calls": total.calls / num_steps, "ms": 1000 * total.seconds / num_steps}
        for name, total in longest
    ]


def _phase_lines(phases: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    with_device = any("device_ms" in phase for phase in phases.values())
    yield f"{'phase':12}{'ms a step':>12}{'share':>9}" + (f"{'device ms':>12}" if with_device else "")
    for name, phase in phases.items():
        line = f"{name:12}{phase['ms']:12.3f}{phase['share']:9.1%}"
        if "device_ms" in phase:
            line += f"{phase['device_ms']:12.3f}"
        if "every" in phase:
            line += f"   {phase['once_ms']:,.0f} ms every {phase['every']:,} steps"
        yield line


def _operation_lines(heading: str, rows: Iterable[Mapping[str, Any]], step_ms: float) -> Iterable[str]:
    yield f"{heading:{_NAME_WIDTH}}{'calls':>9}{'ms a step':>12}{'share':>9}"
    for row in rows:
        name = row["name"] if len(row["name"]) < _NAME_WIDTH else f"{row['name'][: _NAME_WIDTH - 4]}..."
        yield f"{name:{_NAME_WIDTH}}{row['calls']:9.1f}{row['ms']:12.3f}{row['ms'] / step_ms:9.1%}"
