"""What a trace of torch.profiler says in sum: time by phase, and by operation."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

PHASES = ("data", "forward", "backward", "optimizer")
"""Names of the `record_function` spans that a step consists of; time within the inner of two counts there alone."""
REST = "rest"
OUTSIDE = "(outside operations)"
"""Host time of spans in which no operation runs: Python, or waiting for another thread or the device."""

_OPERATIONS = ("cpu_op", "cuda_runtime", "cuda_driver")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_SPANS = "user_annotation"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class _Span(NamedTuple):
    """Times in microseconds."""

    start: float
    end: float
    name: str


@dataclass
class Total:
    """Calls of an operation, and the seconds that it took itself, without the operations that it called."""

    calls: int = 0
    seconds: float = 0.0


class TraceSummary:
    """Sums over one or more traces.

    Attributes:
        host_seconds, device_seconds: by phase; work of the device counts in the phase that launched it.
        operations: totals on the host, by name; `OUTSIDE` is what spans took apart from operations.
        kernels: totals on the device, by name.
    """

    def __init__(self) -> None:
        self.host_seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.device_seconds: dict[str, float] = dict.fromkeys((*PHASES, REST), 0.0)
        self.operations: dict[str, Total] = defaultdict(Total)
        self.kernels: dict[str, Total] = defaultdict(Total)

    def add(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Count a trace in.

        Args:
            events: "traceEvents" of a chrome trace.
        """
        by_category: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for event in events:
            if event.get("ph") == "X":
                by_category[event.get("cat", "")].append(event)
        changes = _phase_changes(_span(event) for event in by_category[_SPANS] if event["name"] in PHASES)
        for (start, phase), (end, _) in pairwise(changes):
            if phase != REST:
                self.host_seconds[phase] += (end - start) / 1e6
        self._add_host(by_category)
        self._add_device(by_category, changes)

    def _add_host(self, by_category: Mapping[str, list[Mapping[str, Any]]]) -> None:
        threads: dict[Any, list[_Span]] = defaultdict(list)
        for category in (*_OPERATIONS, _SPANS):
            for event in by_category[category]:
                name = OUTSIDE if category == _SPANS else event["name"]
                threads[event["tid"]].append(_span(event)._replace(name=name))
        for spans in threads.values():
            self._add_own_times(spans)

    def _add_own_times(self, spans: list[_Span]) -> None:
        """Of the nested calls of one thread."""
        running: list[_Span] = []
        for span in sorted(spans, key=_outer_first):
            while running and running[-1].end <= span.start:
                running.pop()
            seconds = (span.end - span.start) / 1e6
            if running:
                self.operations[running[-1].name].seconds -= seconds
            self.operations[span.name].seconds += seconds
            self.operations[span.name].calls += 1
            running.append(span)

    def _add_device(
        self, by_category: Mapping[str, list[Mapping[str, Any]]], changes: Sequence[tuple[float, str]]
    ) -> None:
        times = [time for time, _ in changes]
        launches = {
            event["args"]["correlation"]: event["ts"]
            for category in _LAUNCHES
            for event in by_category[category]
            if "correlation" in event.get("args", {})
        }
        for category in _ON_DEVICE:
            for event in by_category[category]:
                launched = launches.get(event["args"].get("correlation"), -inf)
                seconds = event["dur"] / 1e6
                self.device_seconds[changes[bisect_right(times, launched) - 1][1]] += seconds
                self.kernels[event["name"]].seconds += seconds
                self.kernels[event["name"]].calls += 1


def _span(event: Mapping[str, Any]) -> _Span:
    return _Span(event["ts"], event["ts"] + event["dur"], event["name"])


def _outer_first(span: _Span) -> tuple[float, float]:
    return span.start, -span.end


def _phase_changes(spans: Iterable[_Span]) -> list[tuple[float, str]]:
    """Times at which another phase begins, and which: the innermost one, `REST` between them."""
    changes, running = [(-inf, REST)], [_Span(-inf, inf, REST)]
    for span in sorted(spans, key=_outer_first):
        while running[-1].end <= span.start:
            changes.append((running.pop().end, running[-1].name))
        running.append(span)
        changes.append((span.start, span.name))
    while len(running) > 1:
        changes.append((running.pop().end, running[-1].name))
    return changes
