"""Evaluates rankers over the full catalogue, item by item.

Every ranker sees the same histories, is asked for the same k and gets the same `allowed`. One policy decides about
items that the history already holds: they may be recommended again unless `exclude_seen` is set, which takes them
out for every ranker alike. `training_items.never_repeats` tells whether the data set asks for that. "Seen" means
the items of the batch's history, which holds the last `max_history` items of the user.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.files import share
from data.schemas import InputError, ItemFilter, SeqBatch
from evaluation.metrics import sliced_metrics, target_ranks
from evaluation.processes import ALONE, Processes
from evaluation.ranker import Ranker, check_ranking


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one ranker did on one split.

    Attributes:
        ranker: its name.
        metrics: `{ranker}/{split}/{slice}/{metric}` -> value; a slice without users has its count (0) alone.
        ranks: [E] int32 place of each target, 0 when outside the list.
        targets: [E] int64 item ids.
        rows: [E] int64 history row of each example; 0..E-1 when the caller did not say.
    """

    ranker: str
    metrics: dict[str, float]
    ranks: Tensor
    targets: Tensor
    rows: Tensor


def evaluate(
    ranker: Ranker,
    batches: Iterable[SeqBatch],
    *,
    cold: Tensor,
    split: str,
    k: int = 20,
    exclude_seen: bool = False,
    rows: Tensor | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Evaluation:
    """Rank every history and score the lists against the targets.

    Args:
        ranker: what to evaluate.
        batches: histories with targets; with several processes the same on each.
        cold: [N] bool, items that no training range contains.
        split: role name for the keys, "valid" or "test".
        k: length of the lists; metrics with a greater cutoff are left out.
        exclude_seen: forbid the items of a row's history.
        rows: [E] history row of each example, as in the split's ranges.
        progress: show a bar on stderr, in the main process.
        processes: share the batches; each gets the whole evaluation, the one that a process alone would get.

    Raises:
        InputError: if a score is NaN, or a batch has no targets or targets outside the catalogue.
        ValueError: if the ranker breaks its contract; the message names it.
        RuntimeError: if another process failed for a reason other than its input.
    """
    num_items = len(cold)

    def ranked(batch: SeqBatch) -> tuple[Tensor, Tensor]:
        """Ranks of the targets, and the targets."""
        batch_targets = _targets(batch, num_items)
        item_ids = _ranked_items(ranker, batch, k, num_items, exclude_seen)
        return target_ranks(item_ids, batch_targets), batch_targets

    ranks, targets = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int64)]
    total = None if rows is None else len(rows)
    hidden = not (progress and processes.is_main)
    with tqdm(total=total, desc=f"{ranker.name} ({split})", unit=" rows", disable=hidden, leave=False) as bar:
        for batch_ranks, batch_targets in processes.map(ranked, batches):
            ranks.append(batch_ranks)
            targets.append(batch_targets)
            bar.update(len(batch_ranks))
    all_ranks, all_targets = torch.cat(ranks), torch.cat(targets)
    all_rows = torch.arange(len(all_ranks)) if rows is None else rows.cpu().long()
    if len(all_rows) != len(all_ranks):
        raise InputError(f"evaluate expected one row per example, got {len(all_rows)} rows, {len(all_ranks)} examples.")
    sliced = sliced_metrics(all_ranks, cold.cpu()[all_targets], longest_list=k)
    metrics = {f"{ranker.name}/{split}/{key}": value for key, value in sliced.items()}
    return Evaluation(ranker.name, metrics, all_ranks, all_targets, all_rows)


def _ranked_items(ranker: Ranker, batch: SeqBatch, k: int, num_items: int, exclude_seen: bool) -> Tensor:
    """[B, k] item ids on the CPU, checked against the contract."""
    allowed = ItemFilter.unseen(batch) if exclude_seen else None
    with torch.no_grad():
        item_ids, scores = (output.cpu() for output in ranker.rank(batch, k, allowed))
    check_ranking(ranker.name, item_ids, scores, num_rows=len(batch), k=k, num_items=num_items)
    return item_ids


def _targets(batch: SeqBatch, num_items: int) -> Tensor:
    if batch.targets is None:
        raise InputError("evaluation expected batches with targets, got one without. Build them from a split's ranges.")
    targets = batch.targets.cpu()
    if bool(((targets < 0) | (targets >= num_items)).any()):
        raise InputError(
            f"evaluation expected targets in [0, {num_items}), got {int(targets.min())} to {int(targets.max())}. "
            "Is `cold` of the same data set as the histories?"
        )
    return targets


def evaluate_rankers(
    rankers: Sequence[Ranker],
    make_batches: Callable[[], Iterable[SeqBatch]],
    *,
    cold: Tensor,
    split: str,
    k: int = 20,
    exclude_seen: bool = False,
    rows: Tensor | None = None,
    ranks_path: Path | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Evaluate rankers side by side and return their metrics in one dictionary.

    Args:
        rankers: with distinct names.
        make_batches: gives the batches anew for every ranker.
        cold: [N] bool, items that no training range contains.
        split: role name for the keys, "valid" or "test".
        k: length of the lists.
        exclude_seen: forbid the items of a row's history, to every ranker.
        rows: [E] history row of each example.
        ranks_path: file for the per-user ranks, see `save_ranks`; None saves none. The main process writes it.
        progress: show a bar per ranker on stderr, in the main process.
        processes: share the batches; each gets the metrics of all.

    Raises:
        InputError: if two rankers share a name, or as for `evaluate` and `save_ranks`.
    """
    names = [ranker.name for ranker in rankers]
    if len(set(names)) < len(names):
        raise InputError(f"evaluate_rankers expected distinct names, got {names}. Rename one.")
    evaluations = [
        evaluate(
            ranker,
            make_batches(),
            cold=cold,
            split=split,
            k=k,
            exclude_seen=exclude_seen,
            rows=rows,
            progress=progress,
            processes=processes,
        )
        for ranker in rankers
    ]
    if ranks_path is not None:
        processes.on_main(partial(save_ranks, ranks_path, evaluations))
    return {key: value for evaluation in evaluations for key, value in evaluation.metrics.items()}


def save_ranks(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write per-user ranks, so that anyone can recompute metrics or compare two rankers user by user.

    The safetensors file holds `ranks/{ranker}` [E] int32 (0: outside the list), `targets` [E] int32 and `rows` [E]
    int32, the history row of each example.

    Raises:
        InputError: if the evaluations are of different examples, or the file cannot be written.
    """
    first = evaluations[0]
    tensors = {"targets": first.targets.int(), "rows": first.rows.int()}
    for evaluation in evaluations:
        if not (torch.equal(evaluation.targets, first.targets) and torch.equal(evaluation.rows, first.rows)):
            raise InputError(
                f"save_ranks expected evaluations of the same examples, but {evaluation.ranker!r} and "
                f"{first.ranker!r} differ in targets or rows. Save them in two files."
            )
        tensors[f"ranks/{evaluation.ranker}"] = evaluation.ranks
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        share(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the ranks could not be written ({error}). Choose a writable folder.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
