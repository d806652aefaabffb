"""Metrics as one aligned text table: a line per slice and metric, a column per ranker."""

import itertools

from evaluation.metrics import HIGH, LOW, METRICS


def format_metrics(metrics: dict[str, float], *, split: str) -> str:
    """Table of what `evaluate_rankers` returned for one split role.

    A cell is the value with its 95% confidence interval; a slice without users is one line that says so.

    Args:
        metrics: `{ranker}/{split}/{slice}/{metric}` -> value; keys of other split roles are left out.
        split: "valid" or "test".
    """
    parts = [key.split("/") for key in metrics]
    rankers = list(dict.fromkeys(part[0] for part in parts if len(part) == 4 and part[1] == split))
    lines = [["slice", "users", "metric", *rankers]]
    for name in ("all", "warm", "cold"):
        prefixes = [f"{ranker}/{split}/{name}/" for ranker in rankers]
        users = f"{metrics.get(prefixes[0] + 'count', 0):,.0f}" if rankers else "0"
        known = [metric for metric in METRICS if any(prefix + metric in metrics for prefix in prefixes)]
        lines += [[name, users, metric, *(_cell(metrics, prefix + metric) for prefix in prefixes)] for metric in known]
        if not known:
            lines.append([name, users, "-", *("-" for _ in rankers)])
    return _aligned(lines)


def _cell(metrics: dict[str, float], key: str) -> str:
    if key not in metrics:
        return "-"
    return f"{metrics[key]:.4f} [{metrics[key + LOW]:.4f}, {metrics[key + HIGH]:.4f}]"


def _aligned(lines: list[list[str]]) -> str:
    """Columns padded to their widest cell, a rule under the head; slice and users stand once per slice."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = lines[:1]
    for previous, line in itertools.pairwise(lines):
        shown.append(["", "", *line[2:]] if line[0] == previous[0] else line)
    text = [
        "  ".join(cell.rjust(width) if i == 1 else cell.ljust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in shown)
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
