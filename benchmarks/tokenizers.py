"""Claim: on Amazon Beauty, MiniLM features, 3 levels of 256 codes, at least two quantizers use at least 95% of the
codes of every level and give at least 97% distinct ids before collisions are handled, with every seed; with a
reconstruction error within 10% of the best quantizer's, and prefixes of one code at least as pure as those of residual
k-means, in the mean over the seeds. With --sweep: over five learning rates no quantizer gives NaN or a collapsed
codebook unnoticed.

Every quantizer is trained by `train_rqvae.train` with the same encoder, batches, steps and separation loss, so that
rows differ in the quantizer alone. Three rows are there to compare with:

    residual_kmeans     no training; the same codebook sizes on the features themselves
    no_separation       straight_through without the separation loss and without similar items in a batch
    mlp_rotation        base/rqvae.gin: an MLP to 32 dimensions, rotation trick, as in the TIGER paper's sizes

    python -m benchmarks.tokenizers --raw-dir FOLDER --feature-model FOLDER      # 3 seeds, half an hour on two cores
    python -m benchmarks.tokenizers --sweep ...                                  # learning rates, one seed
    python -m benchmarks.tokenizers --quick                                      # the generated shop, seconds
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

from benchmarks.common import REPOSITORY, print_table, write_result
from data.features import FeatureConfig, load_item_features
from data.item_sets import load_datasets
from data.processed import DatasetConfig, RecDataset
from data.schemas import InputError
from evaluation.semantic_ids import purity_by_depth
from modules.estimators import QuantizeMode
from modules.quantize import Distance
from modules.rqvae import RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from train_rqvae import train
from training.cli import run_cli
from training.loop_config import LoopConfig
from training.run_folder import RunOptions

CODEBOOK_SIZES = (256, 256, 256)
SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEPS, SWEEP_STEPS, QUICK_STEPS = 2000, 400, 40

MIN_USE, MIN_UNIQUE, MAX_ERROR_RATIO = 0.95, 0.97, 1.1

_SKIP: dict[str, Any] = {
    "encoder": "skip",
    "embed_dim": 128,
    "hidden_dims": (512,),
    "separation_weight": 20.0,
    "mode": QuantizeMode.STRAIGHT_THROUGH,
}
_MLP: dict[str, Any] = {
    "embed_dim": 32,
    "hidden_dims": (512, 256, 128),
    "mode": QuantizeMode.ROTATION_TRICK,
    "codebook_normalize": True,
}
_TOGETHER = {"neighbours_together": 8, "kmeans_rounds": 15, "pretrain_steps": 0}

QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "straight_through": (_SKIP, _TOGETHER),
    "rotation_trick": ({**_SKIP, "mode": QuantizeMode.ROTATION_TRICK}, _TOGETHER),
    "gumbel_softmax": ({**_SKIP, "mode": QuantizeMode.GUMBEL_SOFTMAX}, _TOGETHER),
    "sim_vq": ({**_SKIP, "sim_vq": True}, _TOGETHER),
    "ema": ({**_SKIP, "ema_decay": 0.99, "restart_after": 50}, _TOGETHER),
    "sinkhorn": ({**_SKIP, "sinkhorn_epsilon": (0.0, 0.0, 0.003)}, _TOGETHER),
    "cosine": ({**_SKIP, "distance": Distance.COSINE}, _TOGETHER),
    "residual_kmeans": ({"encoder": "identity"}, {}),
    "no_separation": ({**_SKIP, "separation_weight": 0.0}, {**_TOGETHER, "neighbours_together": 1}),
    "mlp_rotation": (_MLP, {"pretrain_steps": 300}),
}
"""Fields of RqVaeConfig, and arguments of `train`."""

BASELINES = ("residual_kmeans", "no_separation", "mlp_rotation")


def train_one(
    name: str, dataset: DatasetConfig, features: FeatureConfig, *, width: int, num_steps: int, **choice: Any
) -> tuple[SemanticIdTokenizer, float]:
    """The tokenizer of one quantizer, and the seconds that it took.

    Args:
        name: of the quantizer.
        dataset: whose items.
        features: of the items.
        width: of the features.
        num_steps: of training.
        choice: seed, learning_rate, codebook_sizes.

    Raises:
        InputError: if the codebook collapses or a loss is not finite.
    """
    model, arguments = QUANTIZERS[name]
    loop = LoopConfig(
        num_steps=num_steps,
        learning_rate=choice["learning_rate"],
        schedule="cosine",
        warmup_steps=min(100, num_steps // 4),
        eval_every=max(num_steps // 4, 1),
        checkpoint_every=num_steps,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        started = perf_counter()
        path = train(
            options=RunOptions(command=f"benchmarks.tokenizers {name}"),
            save_dir_root=str(Path(folder) / "run"),
            dataset=dataset,
            features=features,
            model=RqVaeConfig(input_dim=width, codebook_sizes=choice["codebook_sizes"], **model),
            loop=loop,
            batch_size=512,
            seed=choice["seed"],
            **arguments,
        )
        return SemanticIdTokenizer.from_pretrained(path), perf_counter() - started


def measure(tokenizer: SemanticIdTokenizer) -> dict[str, float]:
    """Use, entropy, distinct ids, reconstruction error and prefix purity of a tokenizer."""
    metrics = tokenizer.manifest["metrics"]
    row: dict[str, float] = {}
    for kind in ("use", "entropy"):
        for level in range(tokenizer.num_codebooks):
            row[f"{kind}_{level}"] = round(metrics[f"codebook/{kind}_level_{level}"], 4)
    row["unique"] = round(metrics["codebook/unique_ratio"], 4)
    row["reconstruction"] = round(metrics["valid/reconstruction"], 4)
    for purity in purity_by_depth(tokenizer.codes, tokenizer.catalogue.categories):
        if purity.share is not None:
            row[f"purity_{purity.depth}"] = round(purity.share, 4)
    return row


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per quantizer: means over the seeds, and the smallest use and share of distinct ids of any seed."""
    found = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        its = [row for row in rows if row["implementation"] == name and "unique" in row]
        if not its:
            continue
        levels = [key for key in its[0] if key.startswith("use_")]
        entropies = [key for key in its[0] if key.startswith("entropy_")]
        purities = [key for key in its[0] if key.startswith("purity_")]
        found.append(
            {
                "implementation": name,
                "seeds": len(its),
                "min_use": min(row[key] for row in its for key in levels),
                **{key: round(mean(row[key] for row in its), 3) for key in entropies},
                "unique": round(mean(row["unique"] for row in its), 4),
                "min_unique": min(row["unique"] for row in its),
                "reconstruction": round(mean(row["reconstruction"] for row in its), 4),
                **{key: round(mean(row[key] for row in its if key in row), 4) for key in purities},
                "seconds": round(mean(row["seconds"] for row in its), 1),
            }
        )
    return found


def holding(table: Sequence[dict[str, Any]]) -> list[str]:
    """The quantizers for which the claim holds; the baselines count for what they are compared with only."""
    by_name = {row["implementation"]: row for row in table}
    if "residual_kmeans" not in by_name:
        return []
    best = min(row["reconstruction"] for row in table)
    purest = by_name["residual_kmeans"]["purity_1"]
    return [
        name
        for name, row in by_name.items()
        if name not in BASELINES
        and row["min_use"] >= MIN_USE
        and row["min_unique"] >= MIN_UNIQUE
        and row["reconstruction"] <= MAX_ERROR_RATIO * best
        and row["purity_1"] >= purest
    ]


def main(argv: Sequence[str]) -> int:
    """Train, measure, write after every run, judge."""
    arguments = _arguments(argv)
    dataset, features = _source(arguments)
    (prepared,) = load_datasets([dataset])
    width = load_item_features(prepared, features).values.shape[1]
    result = "tokenizers_sweep" if arguments.sweep else "tokenizers"
    rows: list[dict[str, Any]] = []
    for choice in _choices(arguments):
        row = _row(prepared.name, choice, dataset, features, width)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        path = write_result(result, [*rows, *_table(rows, sweep=arguments.sweep)], quick=arguments.quick)
    print()
    if arguments.sweep:
        return _judge_sweep(rows, path)
    table = summaries(rows)
    print_table(table)
    held = holding(table)
    print(f"\nthe claim holds for {len(held)} quantizers: {', '.join(held) or 'none'}; written to {_shown(path)}")
    return 0 if len(held) >= 2 or arguments.quick else 1


def _judge_sweep(rows: Sequence[dict[str, Any]], path: Path) -> int:
    stopped = [row for row in rows if "stopped" in row]
    print(f"{len(rows)} runs, {len(rows) - len(stopped)} healthy, {len(stopped)} stopped with the error that says why")
    print(f"written to {_shown(path)}")
    return 0


def _table(rows: Sequence[dict[str, Any]], *, sweep: bool) -> list[dict[str, Any]]:
    return [] if sweep else [{"case": "all seeds", **row} for row in summaries(rows)]


def _row(
    case: str, choice: dict[str, Any], dataset: DatasetConfig, features: FeatureConfig, width: int
) -> dict[str, Any]:
    row = {"case": case, "implementation": choice["name"], "seed": choice["seed"], "steps": choice["num_steps"]}
    row["learning_rate"] = choice["learning_rate"]
    try:
        tokenizer, seconds = train_one(dataset=dataset, features=features, width=width, **choice)
    except InputError as error:
        return row | {"stopped": str(error).partition(",")[0]}
    return row | measure(tokenizer) | {"seconds": round(seconds, 1)}


def _choices(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What to train, one seed after the other, so that what is there after a stop is comparable."""
    names = arguments.quantizers or list(QUANTIZERS)
    sizes = (32, 32, 32) if arguments.quick else CODEBOOK_SIZES
    steps = QUICK_STEPS if arguments.quick else SWEEP_STEPS if arguments.sweep else arguments.steps
    if arguments.sweep:
        plan = [(name, 0, rate) for name in names if name != "residual_kmeans" for rate in LEARNING_RATES]
    else:
        plan = [(name, seed, 1e-3) for seed in (SEEDS[:1] if arguments.quick else SEEDS) for name in names]
    return [
        {"name": name, "seed": seed, "learning_rate": rate, "num_steps": steps, "codebook_sizes": sizes}
        for name, seed, rate in plan
    ]


def _source(arguments: argparse.Namespace) -> tuple[DatasetConfig, FeatureConfig]:
    if arguments.quick:
        return DatasetConfig(dataset=RecDataset.DEMO, root=arguments.root), FeatureConfig(encoder="tfidf_svd", dim=128)
    dataset = DatasetConfig(
        dataset=RecDataset.AMAZON, category="beauty", root=arguments.root, raw_dir=arguments.raw_dir
    )
    return dataset, FeatureConfig(model=arguments.feature_model)


def _shown(path: Path) -> Path:
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.tokenizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="dataset", metavar="FOLDER", help="of prepared data and features")
    parser.add_argument("--raw-dir", metavar="FOLDER", help="of Amazon's files in the layout of the P5 archive")
    parser.add_argument(
        "--feature-model",
        default="sentence-transformers/all-MiniLM-L6-v2",
        metavar="MODEL",
        help="a Hub id or a local folder",
    )
    parser.add_argument("--quantizers", nargs="+", choices=list(QUANTIZERS), help="some of them")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of training ({STEPS:,})")
    parser.add_argument("--sweep", action="store_true", help="five learning rates instead of three seeds")
    parser.add_argument("--quick", action="store_true", help="the generated shop, few steps, one seed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
