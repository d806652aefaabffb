"""Rows of a leaderboard as its benchmark writes them."""

from typing import Any

ABOUT = {
    "command": "python -m benchmarks.leaderboard",
    "commit": "0123456",
    "date": "2026-01-02",
    "device": "cpu-abacus",
}
METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")
HEADLINES = ("recall@10", "ndcg@10")


def board_rows(names: list[str], *, cold_users: int = 3, seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """A board of these models, the later the better; the first is the best baseline."""
    users = {"all": 40, "warm": 40 - cold_users, "cold": cold_users}
    settings = {
        "dataset": "demo",
        "split": "leave_one_out",
        "protocol": "demo: 30 items ranked",
        "seeds": list(seeds),
        "quick": False,
        "failed": [],
    }
    head = {"case": "board", "settings": settings, "users": users, "best_baseline": names[0]}
    measured = [_measured(name, index, users, seeds, is_best=index == 0) for index, name in enumerate(names)]
    difference = {"mean": 0.25, "low": 0.125, "high": 0.5, "p_value": 0.0123, "excludes_zero": True, "count": 3}
    within = {
        "case": "difference",
        "implementation": names[-1],
        "minus": names[0],
        "slice": "cold",
        "metric": "ndcg@10",
    }
    published = {
        "case": "published",
        "implementation": "A paper's model",
        "source": "a paper",
        "protocol": "in-set users stand under warm",
        "slices": {"warm": {"recall@10": 0.0931}},
    }
    return [head, *measured, within | difference, published]


def _measured(name: str, index: int, users: dict[str, int], seeds: tuple[int, ...], *, is_best: bool) -> dict[str, Any]:
    value = {
        "mean": 0.01 * index,
        "std": 0.0007 if len(seeds) > 1 else None,
        "low": 0.009 * index,
        "high": 0.02 * index,
    }
    difference = {"mean": -0.015, "low": -0.03, "high": 0.001, "p_value": 0.2, "excludes_zero": False}
    run = {
        "parameters": 1234567,
        "stores": "a count per item" if is_best else "",
        "training_minutes": [44.04 for _ in seeds],
        "tokenizer_minutes": None,
        "evaluation_minutes": [1.26 for _ in seeds],
        "budget_minutes": 45.0,
        "hardware": "Abacus",
        "threads": [1 for _ in seeds],
        "commits": ["0123456"],
        "config": "configs/a.gin",
        "seeds": list(seeds),
    }
    groups = [
        {"low": low, "high": high, "count": 9, **dict.fromkeys(HEADLINES, value)} for low, high in ((0, 0), (1, 7))
    ]
    return {
        "case": "measured",
        "implementation": name,
        "run": run,
        "slices": {
            part: {"count": count, **(dict.fromkeys(METRICS, value) if count else {})} for part, count in users.items()
        },
        "popularity": groups,
        "history_length": groups,
        "against_best_baseline": None
        if is_best
        else {
            part: {metric: {"count": count, **(difference if count else {})} for metric in HEADLINES}
            for part, count in users.items()
        },
    }
