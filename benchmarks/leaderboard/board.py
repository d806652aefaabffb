"""Every number of a leaderboard, computed from saved ranks alone.

A row has metrics of the slices all, warm and cold, of users by how often training contains their target, and of users
by how long their training history is, with the intervals of `evaluation.metrics.confidence_interval` of gains averaged
over the seeds; differences have those of the paired bootstrap over users.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.leaderboard.models import BASELINES
from benchmarks.leaderboard.saved import SavedRanks, SeedRanks, Users
from data.schemas import InputError
from evaluation.comparison import averaged_over_seeds, paired_bootstrap
from evaluation.metrics import confidence_interval, ndcg_gains, recall_gains

METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")
HEADLINES = ("recall@10", "ndcg@10")
"""Metrics of differences and of groups of users."""

SLICES = ("all", "warm", "cold")
SELECTION = "ndcg@10"
"""Of all validation users: by it the best baseline is chosen."""

NUM_SAMPLES = 10_000
"""Of every bootstrap."""

_NUM_GROUPS = 4
_TOLERANCE = 1e-9
_GAINS: dict[str, Callable[[Tensor, int], Tensor]] = {"recall": recall_gains, "ndcg": ndcg_gains}

Row = dict[str, Any]


def build_rows(settings: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], saved: SavedRanks) -> list[Row]:
    """The rows of a result, without those from papers.

    Args:
        settings: of the board, as they are to be told.
        facts: what each row of the table says about its runs, in the order of the table.
        saved: ranks under the same names.

    Returns:
        A row "board" with the settings, the users of each slice and the best baseline; a row "measured" per ranker; a
        row "difference" per hybrid, slice and metric, against the generative ranker of the same model.

    Raises:
        InputError: if facts and ranks are not of the same rows.
    """
    _check_same_rows(facts, saved)
    best = best_baseline(facts, saved)
    users = {name: int(members.sum()) for name, members in slices(saved.test).items()}
    head = {"case": "board", "settings": dict(settings), "users": users, "best_baseline": best}
    measured = [_measured(row, facts[row], saved, best) for row in facts]
    return [head, *measured, *_within_models(facts, saved)]


def _check_same_rows(facts: Mapping[str, Any], saved: SavedRanks) -> None:
    for role, ranks in saved.ranks.items():
        if set(ranks) != set(facts):
            raise InputError(
                f"the saved {role} ranks are of {', '.join(sorted(ranks)) or 'nothing'}, the table's rows are "
                f"{', '.join(sorted(facts)) or 'none'}. Both files must come from one board."
            )


def best_baseline(facts: Mapping[str, Mapping[str, Any]], saved: SavedRanks) -> str | None:
    """The counted or sequence model with the greatest validation NDCG@10; None where the board has none."""
    candidates = [row for row, fact in facts.items() if fact["kind"] in BASELINES]
    return max(candidates, key=lambda row: _validation(saved.ranks["valid"][row]), default=None)


def slices(users: Users) -> dict[str, Tensor]:
    """[E] bool members of each slice."""
    return {"all": torch.ones(len(users), dtype=torch.bool), "warm": ~users.cold, "cold": users.cold}


def gains(ranks: SeedRanks, metric: str, members: Tensor | None = None) -> Tensor:
    """[S, E] float64 gains of each seed and user.

    Args:
        ranks: by seed.
        metric: such as "ndcg@10".
        members: [E] bool, of the users to take; None takes all.
    """
    family, cutoff = metric.split("@")
    stacked = torch.stack([ranks[seed] for seed in sorted(ranks)])
    return _GAINS[family](stacked if members is None else stacked[:, members], int(cutoff))


def _validation(ranks: SeedRanks) -> float:
    return float(gains(ranks, SELECTION).mean())


def _measured(row: str, fact: Mapping[str, Any], saved: SavedRanks, best: str | None) -> Row:
    ranks = saved.ranks["test"][row]
    members = slices(saved.test)
    against = None if best in (None, row) else saved.ranks["test"][str(best)]
    return {
        "case": "measured",
        "implementation": row,
        "run": dict(fact),
        f"validation_{SELECTION}": _validation(saved.ranks["valid"][row]),
        "slices": {name: _metrics(ranks, inside) for name, inside in members.items()},
        "popularity": _groups(ranks, saved.test.popularity),
        "history_length": _groups(ranks, _history_length(saved.test)),
        "against_best_baseline": None
        if against is None
        else {
            name: {metric: difference(ranks, against, metric, inside) for metric in HEADLINES}
            for name, inside in members.items()
        },
    }


def _history_length(users: Users) -> Tensor:
    if users.history_length is None:
        raise InputError("the saved ranks lack history_length. Copy the file again.")
    return users.history_length


def _metrics(ranks: SeedRanks, members: Tensor) -> dict[str, Any]:
    """Count and, unless it is 0, each metric's mean, standard deviation over seeds and interval."""
    values: dict[str, Any] = {"count": int(members.sum())}
    if values["count"] == 0:
        return values
    for metric in METRICS:
        of_seeds = gains(ranks, metric, members)
        means = of_seeds.mean(dim=1)
        low, high = confidence_interval(averaged_over_seeds(of_seeds))
        values[metric] = {
            "mean": float(means.mean()),
            "std": float(means.std(correction=1)) if len(means) > 1 else None,
            "low": low,
            "high": high,
            "seeds": means.tolist(),
        }
    return values


def _groups(ranks: SeedRanks, values: Tensor) -> list[dict[str, Any]]:
    """Means and intervals of users grouped by a count: none at all, then quantiles of the others."""
    found = []
    for low, high in value_groups(values):
        members = (values >= low) & (values <= high)
        group: dict[str, Any] = {"low": low, "high": high, "count": int(members.sum())}
        for metric in HEADLINES:
            of_seeds = gains(ranks, metric, members)
            bounds = confidence_interval(averaged_over_seeds(of_seeds))
            group[metric] = {"mean": float(of_seeds.mean()), "low": bounds[0], "high": bounds[1]}
        found.append(group)
    return found


def value_groups(values: Tensor) -> list[tuple[int, int]]:
    """Least and greatest value of each group: 0 alone where it occurs, then about equally many users each.

    Args:
        values: [E] int32, not negative.
    """
    positive = values[values > 0]
    found = [(0, 0)] if len(positive) < len(values) else []
    if len(positive) == 0:
        return found
    shares = torch.arange(1, _NUM_GROUPS + 1, dtype=torch.float64) / _NUM_GROUPS
    tops = torch.quantile(positive.double(), shares, interpolation="nearest").long().unique().tolist()
    bottoms = [int(positive.min()), *(top + 1 for top in tops[:-1])]
    return [*found, *zip(bottoms, tops, strict=True)]


def difference(ranks: SeedRanks, other: SeedRanks, metric: str, members: Tensor) -> dict[str, Any]:
    """Count of users and, unless it is 0, the paired difference of two rows with its interval."""
    if not bool(members.any()):
        return {"count": 0}
    pair = (gains(ranks, metric, members), gains(other, metric, members))
    found = paired_bootstrap(*pair, num_samples=NUM_SAMPLES)
    return {"count": int(members.sum()), **asdict(found), "excludes_zero": found.excludes_zero}


def _within_models(facts: Mapping[str, Mapping[str, Any]], saved: SavedRanks) -> list[Row]:
    """Each hybrid against the generative ranker of the same model, on all and on cold targets."""
    generative = {fact["model"]: row for row, fact in facts.items() if fact["ranker"] == "generative"}
    members, ranks = slices(saved.test), saved.ranks["test"]
    return [
        {
            "case": "difference",
            "implementation": row,
            "minus": generative[fact["model"]],
            "slice": name,
            "metric": metric,
            **difference(ranks[row], ranks[generative[fact["model"]]], metric, members[name]),
        }
        for row, fact in facts.items()
        if fact["ranker"].startswith("hybrid@") and fact["model"] in generative
        for name in ("all", "cold")
        for metric in HEADLINES
    ]


def recomputed(rows: Sequence[Row], saved: SavedRanks) -> list[str]:
    """Where the rows of a result differ from what the saved ranks say; [] where nothing does.

    Args:
        rows: of a result; those from papers are left out.
        saved: the ranks beside it.

    Raises:
        InputError: if the rows are of no leaderboard, or not those of the ranks.
    """
    try:
        head = next(row for row in rows if row["case"] == "board")
        facts = {row["implementation"]: row["run"] for row in rows if row["case"] == "measured"}
        anew = build_rows(head["settings"], facts, saved)
    except (StopIteration, KeyError, TypeError) as error:
        raise InputError(f"this result is no leaderboard's ({error!r}). Copy it again.") from error
    return _differences("rows", [row for row in rows if row["case"] != "published"], anew)


def _differences(place: str, written: Any, anew: Any) -> list[str]:
    """Places at which two JSON values differ."""
    if isinstance(written, Mapping) and isinstance(anew, Mapping) and written.keys() == anew.keys():
        return [line for key in written for line in _differences(f"{place}/{key}", written[key], anew[key])]
    if isinstance(written, list) and isinstance(anew, list | tuple) and len(written) == len(anew):
        pairs = enumerate(zip(written, anew, strict=True))
        return [line for index, pair in pairs for line in _differences(f"{place}/{index}", *pair)]
    if isinstance(written, float) and isinstance(anew, float | int):
        return [] if math.isclose(written, anew, rel_tol=0, abs_tol=_TOLERANCE) else [f"{place}: {written}, now {anew}"]
    return [] if written == anew else [f"{place}: {written}, now {anew}"]
