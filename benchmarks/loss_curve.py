"""Claim: with dropout 0 in fp32, training on a GPU follows the loss curve of a CPU.

Trains the decoder (d_model 128) for some steps on a prepared folder, the same batches and start weights everywhere, and
writes the loss of every step; with --against, compares with a curve that was written elsewhere. FOLDER holds `dataset`
(a prepared data set, or the root of one) and `tokenizer` (an artifact). Needs torch, numpy, gin, accelerate and
safetensors.

Rounding differs between devices, and training amplifies differences, so curves that agree at first drift apart in the
end. Two CPU twins of the ops, which round differently, drift apart by 0.005% within the first 100 steps. The tolerance
over those steps is twenty times that, 0.1%; the first loss, before any update, must agree within 0.001%.

    python -m benchmarks.loss_curve --prepared FOLDER --device cpu
    python -m benchmarks.loss_curve --prepared FOLDER --device cuda --against CURVE.json
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import begin, parser, print_table, write_result
from data.batching import ExampleStrategy, TrainingBatches
from data.processed import PreparedDataset
from data.schemas import InputError
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from ops.graphs import GraphedCall
from training.cli import run_cli

COMPARED_STEPS = 100
TOLERANCE = 1e-3
START_TOLERANCE = 1e-5


def open_prepared(folder: Path) -> tuple[PreparedDataset, SemanticIdTokenizer]:
    """Data set and tokenizer of a folder.

    Raises:
        InputError: if there is not exactly one data set, or the tokenizer is of another one.
    """
    found = sorted(path.parent for path in (folder / "dataset").rglob("manifest.json"))
    if len(found) != 1:
        raise InputError(f"{folder / 'dataset'} expected one prepared data set, got {len(found)} of them.")
    dataset, tokenizer = PreparedDataset(found[0]), SemanticIdTokenizer.from_pretrained(folder / "tokenizer")
    if tokenizer.catalogue.item_keys != dataset.catalogue.item_keys:
        raise InputError(f"the tokenizer of {folder} does not know the items of its data set. Train one on that.")
    return dataset, tokenizer


def train(
    dataset: PreparedDataset,
    tokenizer: SemanticIdTokenizer,
    *,
    num_steps: int,
    batch_size: int,
    device: str,
    graphs: bool = True,
    sizes: dict[str, Any] | None = None,
) -> list[float]:
    """Loss of every step, the sum over levels."""
    torch.manual_seed(0)
    languages = {tokenizer.language: tokenizer.level_sizes}
    config = RetrievalModelConfig(languages=languages, **({"dropout": 0.0} | (sizes or {})))
    model = EncoderDecoderRetrievalModel(config).to(device).train()
    sequences = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary, language=tokenizer.language).to(device)
    batches = TrainingBatches(
        dataset.histories,
        dataset.split("leave_one_out").train,
        strategy=ExampleStrategy.EVERY_PREFIX,
        max_history=20,
        batch_size=batch_size,
        seed=0,
        device=torch.device(device),
        fixed_capacity=True,
    )
    step = _step(model, lambda drawn: model(sequences(batches.pack(drawn)))["loss"], device)
    memory = list(model.parameters())
    step = GraphedCall(step, device=torch.device(device), name="loss curve", enabled=graphs, memory=memory)
    losses = [step(batches.draw(number)).clone() for number in range(num_steps)]
    return torch.stack(losses).cpu().double().tolist()


def _step(
    model: EncoderDecoderRetrievalModel, loss_of: Callable[[Any], Tensor], device: str
) -> Callable[[Any], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=device != "cpu")

    def step(drawn: Any) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(drawn)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compare(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two curves lie apart, and whether they agree.

    Raises:
        InputError: if they are of different data or settings.
    """
    keys = ("dataset_hash", "tokenizer_hash", "batch_size")
    differing = [key for key in keys if row[key] != other.get(key)]
    if differing:
        raise InputError(f"--against: the other curve has another {' and '.join(differing)}. Record it again.")
    pairs = list(zip(row["losses"], other["losses"], strict=False))[:COMPARED_STEPS]
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]
    return {
        "compared_steps": len(pairs),
        "start_difference": differences[0],
        "largest_difference": max(differences),
        "tolerance": TOLERANCE,
        "agrees": differences[0] <= START_TOLERANCE and max(differences) <= TOLERANCE,
    }


def read_curve(path: Path) -> dict[str, Any]:
    """The row of a curve that this module wrote.

    Raises:
        InputError: if it is none.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8"))["rows"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"--against: {path} is no curve of this benchmark ({error}).") from error
    if "losses" not in row:
        raise InputError(f"--against: {path} is no curve of this benchmark: it has no losses.")
    return row


def main(argv: Sequence[str]) -> int:
    """Train, compare, write."""
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--prepared", type=Path, required=True, metavar="FOLDER", help="dataset and tokenizer")
    arguments_of.add_argument("--steps", type=int, help="default: 200; quick: 3")
    arguments_of.add_argument("--batch-size", type=int, default=256)
    arguments_of.add_argument("--against", type=Path, metavar="CURVE.json", help="written on another device")
    arguments_of.add_argument("--no-graphs", action="store_true", help="do not record steps on a GPU")
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    dataset, tokenizer = open_prepared(arguments.prepared)
    other = None if arguments.against is None else read_curve(arguments.against)
    num_steps, size = arguments.steps or (3 if arguments.quick else 200), arguments.batch_size
    losses = train(
        dataset, tokenizer, num_steps=num_steps, batch_size=size, device=device, graphs=not arguments.no_graphs
    )
    row: dict[str, Any] = {
        "case": f"{dataset.name}, batch {size}, {num_steps} steps, fp32, dropout 0",
        "implementation": "ours",
        "dataset_hash": dataset.manifest_hash,
        "tokenizer_hash": tokenizer.content_hash,
        "batch_size": size,
        "losses": [round(loss, 6) for loss in losses],
    }
    shown: dict[str, Any] = {"case": row["case"], "first": losses[0], "last": losses[-1]}
    verdict = {} if other is None else compare(row, other)
    print_table([shown | verdict])
    name = "loss_curve"
    path = write_result(name, [row | verdict], device=device, quick=arguments.quick, results=arguments.results)
    print("written to", path)
    return 0 if verdict.get("agrees", True) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
