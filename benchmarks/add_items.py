"""Claim: 1,000 items, given their features, join a catalogue of Amazon Beauty's size in less than a second, after which
the dense and the hybrid ranker list them.

What is timed is `Recommender.add_items` and the list of one history behind it: semantic ids from the frozen RQ-VAE, the
trie, the item features, and the projections of the new items. Verified first: the lists are those of cosines computed
item by item, and all new items, which are cold, are in them. Weights, features and ids of the catalogue are random.

    ours          the items join a recommender that has ranked before
    ours_saved    and the artifact is written, as a server with --save does before it answers
    built_anew    a ranker of the catalogue that has grown already, and its first list

    python -m benchmarks.add_items
    python -m benchmarks.add_items --quick     # 1,000 items that 50 join; no claim
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.catalogues import random_semantic_ids
from benchmarks.common import begin, finish, parser, ratios, summarize, synchronize
from benchmarks.rungs import OURS
from data.schemas import Catalogue, SeqBatch
from modules.artifact import ModelArtifact
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.recommender import Recommender
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from training.cli import run_cli

NUM_ITEMS, NUM_ADDED, FEATURES = 12_101, 1000, 384
QUICK_ITEMS, QUICK_ADDED = 1000, 50
CODE_SIZES, DEDUP_SIZE = (256, 256, 256), 64
MODES = ("dense", "hybrid@20")
HISTORY = [3, 14, 159, 26, 535]
CLAIM_MS = 1000
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Joining:
    """An artifact, and the items that join it."""

    artifact: ModelArtifact
    keys: list[str]
    features: Tensor

    @property
    def history(self) -> list[str]:
        """Item keys of the one history that is ranked."""
        return [self.artifact.catalogue.item_keys[item] for item in HISTORY]

    def recommender(self, mode: str) -> Recommender:
        """One that has ranked the catalogue as it was."""
        made = Recommender(self.artifact.make_ranker(mode=mode), self.artifact.catalogue, artifact=self.artifact)
        made.recommend([self.history], 20)
        return made

    def join(self, recommender: Recommender) -> None:
        """Add the items, and rank."""
        recommender.add_items(self.keys, self.features)
        recommender.recommend([self.history], 20)


def random_joining(num_items: int, num_added: int, device: str) -> Joining:
    """A model with a dense head and an RQ-VAE that nobody trained."""
    torch.manual_seed(0)
    features = torch.randn(num_items + num_added, FEATURES)
    rqvae = RqVae(RqVaeConfig(input_dim=FEATURES, embed_dim=32, hidden_dims=(256,), codebook_sizes=CODE_SIZES))
    rqvae.initialize_codebooks_(features)  # spread, so that few new items share their codes
    keys = [f"item-{item}" for item in range(num_items + num_added)]
    texts = [""] * num_items
    tokenizer = SemanticIdTokenizer(
        rqvae,
        random_semantic_ids(num_items, CODE_SIZES),
        (*CODE_SIZES, DEDUP_SIZE),
        Catalogue(keys[:num_items], texts, texts),
        language="text",
        manifest={},
    )
    items = ItemTable(features[:num_items], torch.zeros(num_items).bool(), torch.arange(num_items) % 100 == 0)
    config = RetrievalModelConfig(
        languages={"text": tokenizer.level_sizes},
        items=ItemInputConfig(num_features=FEATURES),
        embedding_loss_weight=1.0,
    )
    model = EncoderDecoderRetrievalModel(config).to(device).eval()
    artifact = ModelArtifact(
        "retrieval",
        model,
        tokenizer.catalogue,
        tokenizer,
        items,
        {"beam_width": 20},
        {"tokenizer_hash": tokenizer.content_hash},
    )
    return Joining(artifact, keys[num_items:], features[num_items:])


@torch.no_grad()
def cosines(joining: Joining) -> Tensor:
    """[N + M] of all items with the history, the new ones last, from one product."""
    artifact = joining.artifact
    model: Any = artifact.model
    device, items, tokenizer = artifact.device, artifact.items, artifact.tokenizer_for("ranking")
    assert items is not None
    rows = torch.arange(len(items), len(items) + len(joining.keys))
    vectors = model.project_items(items.with_rows(rows, joining.features).to(device))
    tokenize = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary, language=model.language).to(device)
    query = model.queries(tokenize(SeqBatch.from_lists([HISTORY]).to(device)), vectors)
    return torch.cosine_similarity(query, vectors).cpu()


def verify(joining: Joining) -> None:
    """The lists behind a change are those of the cosines, with every new item among them (AssertionError)."""
    expected = cosines(joining)
    for mode in MODES:
        recommender = joining.recommender(mode)
        joining.join(recommender)
        (ranked,) = recommender.recommend([joining.history], len(expected))
        ids = {key: item for item, key in enumerate(recommender.catalogue.item_keys)}
        listed = torch.tensor([ids[item.item_key] for item in ranked])
        scores = torch.tensor([item.score for item in ranked])
        torch.testing.assert_close(scores, expected[listed], rtol=0, atol=TOLERANCE)
        new = {item.item_key for item in ranked}.intersection(joining.keys)
        num_listed = len(expected) if mode == "dense" else len(ranked)
        if len(new) < len(joining.keys) or len(ranked) != num_listed or bool((scores.diff() > 0).any()):
            raise AssertionError(f"{mode}: {len(new)} of {len(joining.keys)} new items in a list of {len(ranked)}.")
    print(f"verified: {len(joining.keys):,} new items are in the lists of {' and '.join(MODES)}, by their cosines")


def rows_of(joining: Joining, mode: str, repeats: int, device: str) -> list[dict[str, Any]]:
    """Result rows of one mode; the implementations take turns, each with objects of its own."""
    grown = joining.recommender(mode)
    joining.join(grown)
    artifact = grown.artifact
    assert artifact is not None

    def built_anew(_: Recommender) -> None:
        ranker = artifact.make_ranker(mode=mode)
        Recommender(ranker, artifact.catalogue, artifact=artifact).recommend([joining.history], 20)

    with tempfile.TemporaryDirectory() as folder:

        def saved(recommender: Recommender) -> None:
            joining.join(recommender)
            recommender.save_pretrained(Path(folder) / "model")

        contenders: dict[str, Callable[[Recommender], None]] = {
            OURS: joining.join,
            "ours_saved": saved,
            "built_anew": built_anew,
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, run in contenders.items():
                recommender = joining.recommender(mode)
                synchronize(device)
                start = perf_counter()
                run(recommender)
                synchronize(device)
                seconds[name].append(perf_counter() - start)
    case = f"{mode}: {len(joining.keys):,} items join {len(joining.artifact.catalogue):,}, features of {FEATURES}"
    rows: list[dict[str, Any]] = [
        {"case": case, "implementation": name, **summarize(times)} for name, times in seconds.items()
    ]
    times_ours = {OURS: 1.0} | ratios(rows, of=OURS)
    return [row | {"times_ours": times_ours[row["implementation"]]} for row in rows]


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The claim."""
    slowest = max(row["median_ms"] for row in rows if row["implementation"] == OURS)
    case = f"claim: {NUM_ADDED:,} items join in less than {CLAIM_MS:,} ms"
    return {"case": case, "median_ms": slowest, "holds": slowest < CLAIM_MS}


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device, quick = begin(arguments), arguments.quick
    sizes = (QUICK_ITEMS, QUICK_ADDED) if quick else (NUM_ITEMS, NUM_ADDED)
    joining = random_joining(*sizes, device)
    verify(joining)
    rows = [row for mode in MODES for row in rows_of(joining, mode, 2 if quick else 10, device)]
    claims = [] if quick else [verdict(rows)]
    finish("add_items", [*rows, *claims], arguments, device)
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
