"""How rankers are evaluated on a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batching import cold_items, evaluation_batches
from data.processed import PreparedDataset
from data.schemas import InputError, Ranges, Split
from evaluation.evaluator import evaluate_rankers
from evaluation.processes import ALONE, Processes
from evaluation.ranker import Ranker
from evaluation.training_items import never_repeats
from modules.baselines.item_knn import ItemKNNRanker
from modules.baselines.popularity import PopularityRanker
from training.processes import process_state


def run_processes() -> Processes:
    """The processes of this run, as evaluation shares work among them."""
    state = process_state()
    return Processes(state.process_index, state.num_processes)


@dataclass(frozen=True, eq=False)
class EvaluationProtocol:
    """How rankers are evaluated on a dataset; training and evaluate.py share it, so that their numbers agree.

    Attributes:
        dataset: what is ranked.
        split: which targets are held out.
        cold: [N] bool, items that no training range contains.
        max_history: items that rankers are given of a history, the last ones.
        exclude_seen: take the items of the history out, for every ranker.
    """

    dataset: PreparedDataset
    split: Split
    cold: Tensor
    max_history: int
    exclude_seen: bool

    @classmethod
    def of(
        cls, dataset: PreparedDataset, split_name: str, *, max_history: int, exclude_seen: bool | None = None
    ) -> "EvaluationProtocol":
        """The protocol of a stored split; with exclude_seen None, seen items are out where training repeats none."""
        split = dataset.split(split_name)
        if exclude_seen is None:
            exclude_seen = never_repeats(dataset.histories, split.train)
        cold = cold_items(dataset.histories, split, len(dataset.catalogue))
        return cls(dataset, split, cold, max_history, exclude_seen)

    def describe(self) -> str:
        """One line for the head of a table, with how many users and items are cold."""
        seen = "excluded" if self.exclude_seen else "allowed"
        valid, test = (f"{counts['cold']:,} of {counts['all']:,}" for counts in map(self.counts, ("valid", "test")))
        return (
            f"{self.dataset.name}, {self.split.name}: {len(self.cold):,} items ranked, seen items {seen}; "
            f"cold: {int(self.cold.sum()):,} items, {valid} valid and {test} test users"
        )

    def counts(self, role: str) -> dict[str, int]:
        """How many users of a role there are, by whether training contains their targets.

        Args:
            role: "valid" or "test".

        Returns:
            "all", "warm" and "cold" users, and "cold_items", the distinct items that are targets of the cold ones.
        """
        ranges = self.split.role(role)
        starts = self.dataset.histories.offsets[ranges.rows.long()]
        targets = self.dataset.histories.item_ids[(starts + ranges.ends).long()].long()
        cold = targets[self.cold[targets]]
        return {
            "all": len(targets),
            "warm": len(targets) - len(cold),
            "cold": len(cold),
            "cold_items": len(cold.unique()),
        }

    def baselines(self) -> list[Ranker]:
        """Popularity and ItemKNN, fitted on the training ranges."""
        fitted = (self.dataset.histories, self.split.train, len(self.cold))
        rankers = (PopularityRanker.fit(*fitted), ItemKNNRanker.fit(*fitted))
        return [ranker.with_settings(max_history=self.max_history) for ranker in rankers]

    def evaluate(
        self,
        rankers: Sequence[Ranker],
        role: str,
        *,
        batch_size: int = 256,
        max_users: int | None = None,
        seed: int = 0,
        ranks_path: Path | None = None,
        progress: bool = False,
        processes: Processes = ALONE,
    ) -> dict[str, float]:
        """Metrics of rankers side by side.

        Args:
            rankers: with distinct names.
            role: "valid" or "test".
            batch_size: histories ranked at once.
            max_users: evaluate on that many users, drawn once by `seed`; None takes all.
            seed: of that draw.
            ranks_path: file for the per-user ranks; None saves none.
            progress: show a bar per ranker on stderr.
            processes: share the users, each calling this method.

        Raises:
            InputError: if max_users is not positive, or as for `evaluation.evaluator.evaluate_rankers`.
        """
        ranges = _drawn(self.split.role(role), max_users, seed)
        return evaluate_rankers(
            rankers,
            lambda: evaluation_batches(
                self.dataset.histories, ranges, max_history=self.max_history, batch_size=batch_size
            ),
            cold=self.cold,
            split=role,
            exclude_seen=self.exclude_seen,
            rows=ranges.rows,
            ranks_path=ranks_path,
            progress=progress,
            processes=processes,
        )


def _drawn(ranges: Ranges, max_users: int | None, seed: int) -> Ranges:
    """At most max_users of the ranges, in their order."""
    if max_users is not None and max_users < 1:
        raise InputError(f"expected at least 1 user to evaluate on, or None for all, got max_users = {max_users}.")
    if max_users is None or max_users >= len(ranges):
        return ranges
    order = torch.randperm(len(ranges), generator=torch.Generator().manual_seed(seed))
    chosen = order[:max_users].sort().values
    return Ranges(ranges.rows[chosen], ranges.begins[chosen], ranges.ends[chosen])
