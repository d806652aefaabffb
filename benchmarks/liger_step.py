"""Claim: a LIGER step takes at most twice as long as a TIGER step of the same size on a CPU, 1.3 times on a GPU.

Training steps of real lengths of histories at batch 256, over 12,101 items with random features, dropout on, by the
OptimizerStep of the training loop (on a GPU as CUDA graphs). LIGER adds to TIGER the projection of the whole catalogue,
the vectors that tokens gather from it, and the loss over the catalogue. Losses and gradients are verified first.

    tiger        codes alone
    ours         LIGER: item features on the encoder's input, losses of the decoder and of the dense head
    dense_only   LIGER without a decoder
    tiger_text   TIGER that reads item features

Two sizes: `small` is that of `configs/base/small.gin` with MiniLM features, `full` that of the paper. A row is
paired with TIGER's: `times_tiger` is the median over rounds of its time over that of the same round. `kept_kb` is what
the loss of one more example keeps for the backward pass: the same for any width of the features.

    python -m benchmarks.liger_step
    python -m benchmarks.liger_step --quick     # the small size, few steps
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.common import begin, finish, interleaved, parser, peak_memory, summarize
from benchmarks.histories import (
    LEVEL_SIZES,
    MAX_HISTORY,
    NUM_ITEMS,
    add_lengths_argument,
    build_batches,
    build_tokenizer,
    read_lengths,
)
from benchmarks.rungs import OURS
from data.batching import TrainingBatches
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from tasks.retrieval import RetrievalTask
from training.cli import run_cli
from training.loop_config import LoopConfig
from training.memory import estimate_memory
from training.optimizers import build_optimizer
from training.step import OptimizerStep

TIGER = "tiger"
CLAIMS = {"cpu": 2.0, "cuda": 1.3}
"""Times a TIGER step."""
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
"""Of a gradient's difference, relative to its norm."""
_MISSING = 20
"""Items without features."""


@dataclass(frozen=True)
class Size:
    """Of a model, of the item features, and of their projection."""

    model: dict[str, Any]
    width: int
    hidden_dims: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """How contenders are timed."""

    device: str
    precision: str
    batch_size: int
    warmup: int
    repeats: int


SIZES = {
    "small": Size(
        {"num_heads": 4, "head_dim": 32, "d_ff": 512, "num_encoder_layers": 2, "num_decoder_layers": 2},
        width=384,
        hidden_dims=(512,),
    ),
    "full": Size({"num_encoder_layers": 6, "num_decoder_layers": 6, "dropout": 0.2}, 768, (768, 512, 256)),
}


def configs_of(size: Size) -> dict[str, RetrievalModelConfig]:
    """The contenders of one size."""
    tiger = RetrievalModelConfig(languages={"text": LEVEL_SIZES}, d_model=128, num_user_buckets=0, **size.model)
    items = ItemInputConfig(num_features=size.width, hidden_dims=size.hidden_dims, num_positions=MAX_HISTORY)
    liger = replace(tiger, items=items, embedding_loss_weight=1.0)
    dense_only, text = replace(liger, sid_loss_weight=0.0), replace(tiger, items=items)
    return {TIGER: tiger, OURS: liger, "dense_only": dense_only, "tiger_text": text}


def build_items(width: int) -> ItemTable:
    """Random features of all items, of which some lack them; none is cold, since any may be a target."""
    features = torch.randn(NUM_ITEMS, width, generator=torch.Generator().manual_seed(2))
    missing = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    missing[:: NUM_ITEMS // _MISSING] = True
    return ItemTable(features.masked_fill(missing[:, None], 0.0), missing, torch.zeros_like(missing))


def build_model(config: RetrievalModelConfig, device: str) -> tuple[EncoderDecoderRetrievalModel, ItemTable | None]:
    """A model on a device, and the items that it reads."""
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(config)
    if config.items is None:
        return model.to(device), None
    items = build_items(config.items.num_features)
    model.fit_features_(items)
    return model.to(device), items.to(device)


class Contender:
    """Training steps of one model.

    Args:
        config: of the model.
        batches: of item ids.
        precision: of the loop.
        device: "cpu" or "cuda".
    """

    def __init__(self, config: RetrievalModelConfig, batches: TrainingBatches, *, precision: str, device: str) -> None:
        model, items = build_model(config, device)
        self.task = RetrievalTask(
            model.train(),
            batches,
            tokenize=build_tokenizer(config, device),
            item_keys=[],
            validate=dict,
            items=items,
        )
        self.config = LoopConfig(num_steps=1, learning_rate=1e-3, mixed_precision=precision)  # type: ignore[arg-type]
        recorded = self.config.uses_cuda_graphs()
        AcceleratorState._reset_state()
        self._step = OptimizerStep(
            self.task,
            model,
            build_optimizer(model, self.config, recorded=recorded),
            accelerator=Accelerator(cpu=device == "cpu", mixed_precision=precision),
            config=self.config,
            recorded=recorded,
        )
        self._number = 0

    def __call__(self) -> Tensor:
        """One step; what it logs."""
        self._number += 1
        return self._step([self.task.batch(self._number)]).values


def verify(config: RetrievalModelConfig, batches: TrainingBatches, device: str) -> None:
    """Stop unless LIGER's loss and gradients are those of plain PyTorch over all scores at once, dropout off.

    Raises:
        AssertionError: if they differ, so that no time is reported.
    """
    model, items = build_model(config, device)
    assert config.items is not None
    assert items is not None
    histories = batches.batch(0)
    targets = histories.targets
    assert targets is not None
    batch = build_tokenizer(config, device)(histories)
    loss = model.eval()(batch, items)["loss"]
    vectors = model.project_items(items)
    scores = model.queries(batch, vectors) @ F.normalize(vectors, dim=1).t() / config.items.temperature
    expected = F.cross_entropy(scores, targets) - model.log_likelihood(batch, vectors).mean()
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(total, parameters) for total in (loss, expected))
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))
        if not error <= GRADIENT_TOLERANCE:
            raise AssertionError(f"the gradient of {name} differs from plain PyTorch's by {error:.1e}.")
    print(f"verified: loss and {len(parameters)} gradients of LIGER equal those of all {NUM_ITEMS:,} scores at once")


def kept_kb(config: RetrievalModelConfig, lengths: np.ndarray, batch_size: int, device: str) -> float:
    """Kilobytes that the loss of one more example keeps for the backward pass."""
    kept = []
    for size in (batch_size, 2 * batch_size):
        one = Contender(config, build_batches(lengths, size, device=device), precision="no", device=device)
        kept.append(estimate_memory(one.task, one.config, torch.device(device)).activations)
    return round((kept[1] - kept[0]) / batch_size / 1024, 1)


def run(case: str, size: Size, names: Sequence[str], lengths: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    """Result rows of one size and precision."""
    configs, device = configs_of(size), settings.device
    batches = build_batches(lengths, settings.batch_size, device=device, fixed_capacity=device == "cuda")
    verify(configs[OURS], batches, device)
    rows: dict[str, dict[str, Any]] = {}
    contenders = {}
    for name in names:
        rows[name] = {"case": case, "implementation": name}
        with peak_memory(rows[name], device):
            contender = Contender(configs[name], batches, precision=settings.precision, device=device)
            for _ in range(settings.warmup):
                contender()
        contenders[name] = contender
    calls = 10 if device == "cuda" else 1
    seconds = interleaved(contenders, repeats=settings.repeats, warmup=1, device=device, calls=calls)
    for name, values in seconds.items():
        paired = [own / base for own, base in zip(values, seconds[TIGER], strict=True)]
        rows[name] |= {**summarize(values), "times_tiger": round(statistics.median(paired), 3)}
    return list(rows.values())


def memory_rows(case: str, size: Size, lengths: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    """What one more example keeps, for features of two widths.

    Raises:
        AssertionError: if it depends on the width.
    """
    rows = []
    for width in (size.width, 4 * size.width):
        config = configs_of(replace(size, width=width))[OURS]
        kept = kept_kb(config, lengths, settings.batch_size, settings.device)
        rows.append({"case": f"{case}, features of width {width}", "implementation": OURS, "kept_kb": kept})
    if rows[0]["kept_kb"] != rows[1]["kept_kb"]:
        raise AssertionError(f"an example keeps more with wider features: {[row['kept_kb'] for row in rows]} KB.")
    return rows


def verdict(rows: Sequence[dict[str, Any]], device: str) -> list[str]:
    """A line per case: is the claim met?"""
    claim = CLAIMS[device]
    return [
        f"claim: at most {claim} times a TIGER step; {row['case']}: {row['times_tiger']}, "
        f"{'met' if row['times_tiger'] <= claim else 'MISSED'}"
        for row in rows
        if row["implementation"] == OURS and "times_tiger" in row
    ]


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments_of = parser(__doc__)
    add_lengths_argument(arguments_of)
    arguments_of.add_argument("--batch-size", type=int, help="default: 256; quick: 64")
    arguments_of.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: all; quick: small")
    arguments = arguments_of.parse_args(argv)
    device, quick = begin(arguments), arguments.quick
    lengths, source = read_lengths(arguments.lengths)
    batch_size = arguments.batch_size or (64 if quick else 256)
    automatic = LoopConfig(num_steps=1, learning_rate=1e-3).precision_on(torch.device(device))
    warmup, repeats = (2, 3) if quick else (60, 20) if device == "cuda" else (3, 12)
    rows = []
    for name in arguments.sizes or (["small"] if quick else list(SIZES)):
        for precision in dict.fromkeys([automatic] if quick else ["no", automatic]):
            settings = Settings(device, precision, batch_size, warmup, repeats)
            case = f"{name}, {source}, batch {batch_size}, {'fp32' if precision == 'no' else precision}"
            size = SIZES[name]
            rows += run(case, size, (TIGER, OURS) if quick else tuple(configs_of(size)), lengths, settings)
        rows += memory_rows(f"{name}, {source}, batch {batch_size}", SIZES[name], lengths, settings)
    print("\n".join(verdict(rows, device)))
    finish("liger_step", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
