"""Claim: none. How much of what scoring every item exactly finds does a beam find, and how much faster is it?

For beams of growing width: the share of the exact top 10 that the beam's top 10 holds, how often the held-out item is
among both (on real data), and milliseconds per user; the exact walk over the whole catalogue is the last row. Before,
every beam's scores are held against the exact ones of the same items.

    python -m benchmarks.beam_recall --artifact RUN_OR_ARTIFACT        # test users of the data set it was trained on
    python -m benchmarks.beam_recall --artifact RUN --dataset-root FOLDER --users 1000
    python -m benchmarks.beam_recall                                   # random weights, codes and histories
"""

import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.catalogues import random_semantic_ids
from benchmarks.common import begin, finish, parser, synchronize
from benchmarks.histories import LEVEL_SIZES, NUM_ITEMS
from data.batching import evaluation_batches
from data.schemas import Ranges, SeqBatch
from evaluate import dataset_config, matching_dataset
from modules.artifact import load_model_artifact
from modules.generation.exact import ExactRanker
from modules.generation.ranker import GenerativeRanker
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from training.cli import run_cli

K = 10
WIDTHS = (1, 2, 5, 10, 20, 50, 100, 200)
BATCH_SIZE = 64
TOLERANCE = 1e-3
"""Of log-likelihoods; the matrix products of a walk and of a beam differ in shape."""


class RandomTokenizer:
    """What ranking uses of a tokenizer, with distinct random codes."""

    def __init__(self, num_items: int, code_sizes: tuple[int, ...]) -> None:
        self.semantic_ids = random_semantic_ids(num_items, code_sizes)
        self.level_sizes = (*code_sizes, LEVEL_SIZES[-1])
        self.language = "text"
        self.num_items = num_items
        self.available = None


def random_parts(num_items: int, num_users: int, device: str) -> tuple[dict[str, Any], list[SeqBatch], str]:
    """Model, tokenizer and histories that nobody trained."""
    torch.manual_seed(0)
    tokenizer = RandomTokenizer(num_items, LEVEL_SIZES[:-1])
    model = EncoderDecoderRetrievalModel(RetrievalModelConfig(languages={"text": tokenizer.level_sizes}))
    for parameter in model.heads.parameters():  # predictions far from uniform
        parameter.data.mul_(4.0)
    histories = torch.randint(num_items, (num_users, 9), generator=torch.Generator().manual_seed(2)).tolist()
    return {"model": model.to(device), "tokenizer": tokenizer}, [SeqBatch.from_lists(histories)], "random weights"


def trained_parts(arguments: Any, device: str) -> tuple[dict[str, Any], list[SeqBatch], str]:
    """Model and tokenizer of an artifact, and test users of its data set."""
    artifact = load_model_artifact(arguments.artifact, device=device)
    config = dataset_config(artifact.manifest, root=arguments.dataset_root, raw_dir=None)
    dataset = matching_dataset(config, artifact.manifest)
    test = dataset.split(config.split).test
    step = max(len(test) // arguments.users, 1)
    chosen = slice(0, arguments.users * step, step)
    max_history = artifact.ranker_settings.get("max_history", 20)
    batches = evaluation_batches(
        dataset.histories,
        Ranges(test.rows[chosen], test.begins[chosen], test.ends[chosen]),
        max_history=max_history,
        batch_size=BATCH_SIZE,
    )
    parts = {"model": artifact.model, "tokenizer": artifact.tokenizer_for("beam search"), "max_history": max_history}
    return parts, list(batches), dataset.name


def ranked(ranker: Any, batches: Sequence[SeqBatch], k: int, device: str) -> tuple[Tensor, Tensor, float]:
    """Lists of all users, their scores, and milliseconds per user; the first batch is ranked once before."""
    ranker.rank(batches[0], k)
    synchronize(device)
    start = perf_counter()
    lists = [ranker.rank(batch, k) for batch in batches]
    synchronize(device)
    per_user = (perf_counter() - start) * 1000 / sum(len(batch) for batch in batches)
    item_ids, scores = (torch.cat(column).cpu() for column in zip(*lists, strict=True))
    return item_ids, scores, per_user


def share_found(item_ids: Tensor, exact: Tensor) -> float:
    """Mean share of the exact lists' items [U, k] that the other lists [U, k] hold."""
    real = exact >= 0
    found = (exact[:, :, None] == item_ids[:, None, :]).any(2) & real
    return float((found.sum(1) / real.sum(1).clamp(min=1)).mean())


def verify(item_ids: Tensor, scores: Tensor, exact_ids: Tensor, exact_scores: Tensor) -> None:
    """Scores of items that are in both lists agree (AssertionError), so that what is compared is the same thing."""
    same = (item_ids[:, :, None] == exact_ids[:, None, :]) & (item_ids >= 0)[:, :, None]
    gaps = (scores[:, :, None] - exact_scores[:, None, :]).abs().masked_fill(~same, 0.0)
    if not float(gaps.amax()) <= TOLERANCE:
        raise AssertionError(f"a beam's score differs from the exact one by {float(gaps.amax()):.1e}.")


def run(
    parts: dict[str, Any], batches: Sequence[SeqBatch], case: str, widths: Sequence[int], device: str
) -> list[dict[str, Any]]:
    """Result rows: one per width, the exact walk last."""
    exact_ids, exact_scores, exact_ms = ranked(ExactRanker(**parts, batch_size=BATCH_SIZE), batches, K, device)
    targets = None if batches[0].targets is None else torch.cat([batch.targets for batch in batches])  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    for width in (*widths, None):
        row: dict[str, Any] = {"case": case, "implementation": "exact" if width is None else f"beam_{width}"}
        item_ids, scores, ms = exact_ids, exact_scores, exact_ms
        if width is not None:
            ranker = GenerativeRanker(**parts, beam_width=width, batch_size=BATCH_SIZE)
            item_ids, scores, ms = ranked(ranker, batches, min(width, K), device)
            verify(item_ids, scores, exact_ids, exact_scores)
        row |= {"users": len(exact_ids), f"share_of_exact_top_{K}": round(share_found(item_ids, exact_ids), 4)}
        if targets is not None:
            row[f"recall@{K}"] = round(float((item_ids == targets[:, None]).any(1).float().mean()), 4)
        rows.append({**row, "ms_per_user": round(ms, 3), "times_exact": round(exact_ms / ms, 1)})
    return rows


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--artifact", metavar="RUN_OR_ARTIFACT", help="default: random weights")
    arguments_of.add_argument("--dataset-root", metavar="DIR", help="folder of the prepared data sets (as in training)")
    arguments_of.add_argument("--users", type=int, default=1024, help="test users, evenly spread (1,024)")
    arguments_of.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    if arguments.artifact:
        parts, batches, case = trained_parts(arguments, device)
    else:
        parts, batches, case = random_parts(*((300, 8) if arguments.quick else (NUM_ITEMS, BATCH_SIZE)), device)
    widths = arguments.widths[:3] if arguments.quick else arguments.widths
    finish("beam_recall", run(parts, batches, case, widths, device), arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
