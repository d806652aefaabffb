"""How often torch.compile compiles an op whose sizes change."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dynamo.utils import counters


def num_graphs(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> int:
    """Graphs that calls with different sizes make, sizes being symbolic from the first one on."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for arguments in calls:
        compiled(*arguments)
    return counters["stats"]["unique_graphs"]
