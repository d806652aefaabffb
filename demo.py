"""The whole path on a generated shop, offline: train a tokenizer and a retrieval model, evaluate, recommend.

    python demo.py                # under three minutes on two CPU cores; a second call reuses what is there
    python demo.py --overwrite    # from the beginning

An interrupted demo goes on where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import train_decoder
import train_rqvae
from data.batching import evaluation_batches
from data.processed import DatasetConfig, load_dataset
from data.schemas import Catalogue, ItemFilter, Ranges
from data.sources.demo import OracleRanker
from data.sources.demo_world import DemoWorld
from evaluation.table import format_metrics
from modules.artifact import ModelArtifact, load_model_artifact
from tasks.protocol import EvaluationProtocol
from tasks.retrieval import RetrievalTask
from training.cli import main as train_main
from training.cli import run_cli

CONFIGS = "configs/demo"
TOKENIZER_RUN, RUN = Path("runs/demo/rqvae"), Path("runs/demo/decoder")
NUM_SHOPPERS = 5


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description="The whole path on a generated shop, offline.")
    parser.add_argument("--overwrite", action="store_true", help="train again, although the run folders are complete")
    again = parser.parse_args(argv).overwrite
    if again or not (RUN / "metrics.json").is_file():
        code = train(again)
        if code != 0:
            return code
    artifact = load_model_artifact(RUN)
    protocol = protocol_of(artifact)
    show_semantic_ids(artifact)
    show_training_curve(RUN / "metrics.jsonl")
    show_metrics(protocol, artifact)
    show_recommendations(protocol, artifact)
    show_places()
    return 0


def train(again: bool) -> int:
    """Train both stages, or go on where an interrupted demo stopped; returns the exit code."""
    if not again:
        return train_main(train_decoder.train, "train_decoder", [f"{CONFIGS}/decoder.gin", "--resume", "auto"])
    code = train_main(train_rqvae.train, "train_rqvae", [f"{CONFIGS}/rqvae.gin", "--overwrite"])
    return code or train_main(train_decoder.train, "train_decoder", [f"{CONFIGS}/decoder.gin", "--overwrite"])


def protocol_of(artifact: ModelArtifact) -> EvaluationProtocol:
    """The evaluation that training used, on the demo dataset."""
    config = DatasetConfig.from_dict(artifact.manifest["dataset"])
    return EvaluationProtocol.of(
        load_dataset(config), config.split, max_history=artifact.ranker_settings["max_history"]
    )


def show_semantic_ids(artifact: ModelArtifact) -> None:
    """Neighbours in id order: items that share codes should be alike."""
    heading("Semantic ids: items next to each other in id order share their first codes")
    ids, catalogue = artifact.tokenizer_for("the demo").semantic_ids, artifact.catalogue
    order = sorted(range(len(catalogue)), key=lambda item_id: ids[item_id].tolist())
    for item_id in order[200:212]:
        print(f"  {tuple(ids[item_id].tolist())!s:22} {catalogue.display_name(item_id)}")


def show_training_curve(metrics_log: Path) -> None:
    """Loss and validation metric at every evaluation."""
    heading("Training curve")
    loss = float("nan")
    for line in metrics_log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        loss = record.get("train/loss", loss)
        metric = record.get(RetrievalTask.selection_metric)
        if metric is not None:
            print(
                f"  step {record['step']:5d}  loss {loss:6.3f}  valid ndcg@10 {metric:.3f}  {'#' * round(100 * metric)}"
            )


def show_metrics(protocol: EvaluationProtocol, artifact: ModelArtifact) -> None:
    """The run's own test metrics beside those of the generator's oracle."""
    seed = artifact.manifest["dataset"]["seed"]
    oracle = OracleRanker(DemoWorld(seed), protocol.dataset.catalogue)
    stored = json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))
    metrics = {key: value for key, value in (stored | protocol.evaluate([oracle], "test")).items() if shown(key)}
    heading(f"Test metrics, 95% intervals; {protocol.describe()}. The oracle knows the shop's own probabilities")
    print(format_metrics(metrics, split="test"))
    recall = {
        name: metrics[f"{name}/test/all/recall@10"] for name in ("generative", "popularity", "item_knn", "oracle")
    }
    print(
        f"\nrecall@10: {recall['generative'] / recall['popularity']:.1f} times popularity, "
        f"{recall['generative'] / recall['item_knn']:.2f} times ItemKNN, "
        f"{recall['generative'] / recall['oracle']:.0%} of the oracle"
    )


def shown(key: str) -> bool:
    """Whether the demo's short table has this metric."""
    return "/test/" in key and key.rsplit("/", 1)[1].startswith(("count", "recall@10", "ndcg@10"))


def show_recommendations(protocol: EvaluationProtocol, artifact: ModelArtifact) -> None:
    """What five shoppers bought, what is recommended to them, and what they really bought next."""
    heading("Five shoppers: last purchases, recommendations, and (*) what they really bought next")
    test, catalogue = protocol.split.test, artifact.catalogue
    few = Ranges(
        *(column[:: len(test) // NUM_SHOPPERS][:NUM_SHOPPERS] for column in (test.rows, test.begins, test.ends))
    )
    (batch,) = evaluation_batches(
        protocol.dataset.histories, few, max_history=protocol.max_history, batch_size=NUM_SHOPPERS
    )
    assert batch.targets is not None
    allowed = ItemFilter.unseen(batch) if protocol.exclude_seen else None
    ranked, _ = artifact.make_ranker().rank(batch, 10, allowed)
    bounds = batch.offsets.tolist()
    for shopper, target in enumerate(batch.targets.tolist()):
        history = batch.item_ids[bounds[shopper] : bounds[shopper + 1]].tolist()
        print(f"\nshopper {shopper + 1} bought")
        print_items(catalogue, history[-5:])
        print(
            "  recommended"
            + ("" if target in ranked[shopper, :5] else f"; really next: {catalogue.display_name(target)}")
        )
        print_items(catalogue, ranked[shopper, :5].tolist(), target)


def print_items(catalogue: Catalogue, item_ids: list[int], target: int | None = None) -> None:
    """One line an item; the target is marked."""
    for item_id in item_ids:
        path = catalogue.categories[item_id]
        print(f"    {'*' if item_id == target else '-'} {catalogue.display_name(item_id)}  [{path}]")


def show_places() -> None:
    """Where everything lies, and what to call next."""
    heading("Written")
    print(f"  dataset/prepared/demo   prepared tables, histories and splits\n  {TOKENIZER_RUN}/model   tokenizer")
    print(f"  {RUN}/model   retrieval model with its tokenizer\n  {RUN}/report/index.html  curves and metrics")
    print(f"  {RUN}/metrics.json, metrics.jsonl, ranks_test.safetensors\n")
    print(f"Next: python recommend.py {RUN} --history KEY [KEY ...]   or   python evaluate.py {RUN}")


def heading(text: str) -> None:
    """A title line."""
    print(f"\n== {text} ==")


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
