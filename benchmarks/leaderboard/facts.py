"""What the finished runs of a board say about themselves, and the ranks that they saved."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from benchmarks.leaderboard.models import COUNTED, MODELS
from benchmarks.leaderboard.runs import BoardSettings, Run, budget_minutes, tokenizer_folder
from benchmarks.leaderboard.saved import ROLES, SavedRanks, Users, read_run_ranks
from data.processed import DatasetConfig, PreparedDataset, load_dataset
from data.schemas import InputError
from modules.artifact import load_model_artifact
from tasks.protocol import EvaluationProtocol

Facts = dict[str, Any]
_HYBRID = "hybrid@"


def collect(runs: Sequence[Run], settings: BoardSettings) -> tuple[SavedRanks, dict[str, Facts], str]:
    """Ranks and facts of finished runs.

    Args:
        runs: at least one, all finished.
        settings: of the board.

    Returns:
        The ranks, what is to be told about each row of the table, and a line on how all were evaluated.

    Raises:
        InputError: if the runs are not of the same data, split and policy on seen items.
    """
    manifests = {run: read_json(run.folder / "model" / "manifest.json") for run in runs}
    dataset, protocol = _evaluated_on(manifests, settings)
    saved = SavedRanks(Users.of(dataset, settings.split, "test"), Users.of(dataset, settings.split, "valid"))
    runs_of: dict[tuple[str, str], list[Run]] = defaultdict(list)
    names = list(dict.fromkeys(run.name for run in runs))
    for run in sorted(runs, key=lambda run: names.index(run.name)):
        for role in ROLES:
            found = _own(run, read_run_ranks(run.folder, role, saved.users(role)))
            rows = {ranker: run.name if len(found) == 1 else f"{run.name}/{ranker}" for ranker in found}
            for ranker, ranks in found.items():
                saved.add(role, rows[ranker], run.seed, ranks)
        for ranker, row in rows.items():
            runs_of[row, ranker].append(run)
    facts = {row: _facts(ranker, of_row, settings) for (row, ranker), of_row in runs_of.items()}
    return saved, facts, protocol.describe()


def _evaluated_on(
    manifests: Mapping[Run, dict[str, Any]], settings: BoardSettings
) -> tuple[PreparedDataset, EvaluationProtocol]:
    """The data set and protocol that all artifacts name."""
    for key in ("dataset_manifest_hash", "exclude_seen"):
        values = {str(manifest.get(key)): run for run, manifest in manifests.items()}
        if len(values) > 1:
            (one, first), (other, second) = list(values.items())[:2]
            raise InputError(
                f"runs of one board must agree, but {key} is {one} in {first.folder} and {other} in {second.folder}. "
                "Remove one of them and run the board again."
            )
    manifest = next(iter(manifests.values()))
    prepared = load_dataset(DatasetConfig.from_dict(manifest["dataset"]))
    if prepared.manifest_hash != manifest["dataset_manifest_hash"]:
        raise InputError(
            f"{prepared.folder} is not the data that {next(iter(manifests)).folder} was trained on. "
            "Remove the runs of the board, or put the data back."
        )
    protocol = EvaluationProtocol.of(
        prepared, settings.split, max_history=1, exclude_seen=bool(manifest["exclude_seen"])
    )
    return prepared, protocol


def _own(run: Run, ranks: Mapping[str, Any]) -> dict[str, Any]:
    """The ranks of the run's own rankers, without the baselines that every run evaluates beside them, in fixed order.

    Raises:
        InputError: if there are none.
    """
    counted = {name for name, model in MODELS.items() if model.kind == COUNTED and name != run.name}
    own = {ranker: ranks[ranker] for ranker in sorted(ranks, key=_order) if ranker not in counted}
    if run.model.kind == COUNTED:
        own = {ranker: found for ranker, found in own.items() if ranker == run.name}
    if not own:
        raise InputError(f"{run.folder} holds no ranks of {run.name}. Remove the folder and run the board again.")
    return own


def _order(ranker: str) -> tuple[int, int, str]:
    """Generative, dense, then hybrids by width, all last."""
    if ranker.startswith(_HYBRID):
        width = ranker.removeprefix(_HYBRID)
        return (2, int(width) if width.isdigit() else 10**9, ranker)
    return (0 if ranker == "generative" else 1, 0, ranker)


def _facts(ranker: str, runs: Sequence[Run], settings: BoardSettings) -> Facts:
    """What the table says about a row besides its metrics; lists have an entry per seed."""
    records = [run.record() for run in runs]
    metrics = [read_json(run.folder / "metrics.json") for run in runs]
    environments = [read_json(run.folder / "env.json") for run in runs]
    first = runs[0]
    hardware = [environment["hardware"] for environment in environments]
    return {
        "model": first.name,
        "ranker": ranker,
        "kind": first.model.kind,
        "config": _config_name(first.config.path),
        "seeds": [run.seed for run in runs],
        "parameters": _num_parameters(first.folder),
        "stores": first.model.stores,
        "budget_minutes": budget_minutes(first.config, settings),
        "training_minutes": [_minutes(entry.get("seconds")) for entry in metrics],
        "steps": [entry.get("steps") for entry in metrics],
        "best_step": [entry.get("best_step") for entry in metrics],
        "evaluation_minutes": [_minutes(record.get("evaluation_seconds")) for record in records],
        "wall_minutes": [_minutes(record.get("wall_seconds")) for record in records],
        "tokenizer_minutes": _tokenizer_minutes(first),
        "hardware": " or ".join(sorted({", ".join(one["cuda_devices"]) or one["cpu"] for one in hardware})),
        "threads": [one["torch_threads"] for one in hardware],
        "commits": sorted({_short(environment.get("commit") or "unknown") for environment in environments}),
    }


def _num_parameters(folder: Path) -> int:
    """Trainable parameters of a run's artifact, shared ones counted once."""
    model = load_model_artifact(folder).model
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _tokenizer_minutes(run: Run) -> float | None:
    """Training time of the tokenizer that a run stands on; None where it has none of its own."""
    if run.config.tokenizer is None:
        return None
    path = tokenizer_folder(run.config.tokenizer, run.folder.parent.parent) / "metrics.json"
    return _minutes(read_json(path).get("seconds")) if path.is_file() else None


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds / 60, 2)


def _short(commit: str) -> str:
    """The first characters of a commit's hash, and what follows the hash: that there were changes."""
    digest, plus, changes = commit.partition("+")
    return f"{digest[:7]}{plus}{changes}"


def _config_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run folder; InputError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Copy it, or run the board, again.") from error
