"""Claim: a training step of the packed model is at least three times as fast as Hugging Face T5's of the same sizes.

Both sides get the same batches, targets, threads, dropout, start weights and fused AdamW; T5 is padded to the batch's
longest row. Lengths are those of real histories (Amazon Beauty, every prefix, last 20 items); codes are random. Our
time includes building and tokenizing the batch, T5's does not.

    python -m benchmarks.train_step                      # two threads, all rows
    python -m benchmarks.train_step --quick              # few steps, fp32 only
    python -m benchmarks.train_step --raw-dir FOLDER     # FOLDER/sequential_data.txt
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import print_table, summarize, write_result
from benchmarks.hf_t5 import build_t5, t5_inputs, t5_level_losses
from data.batching import ExampleStrategy, TrainingBatches
from data.schemas import Histories, InputError, Ranges, TokenizedSeqBatch
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer

MAX_HISTORY = 20
LEVEL_SIZES = (256, 256, 256, 256)
TOLERANCE = 2e-4


def read_lengths(raw_dir: Path | None) -> tuple[np.ndarray, str]:
    """Items per user, and where they come from."""
    root = os.environ.get("REC_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    file = (raw_dir or Path(root, "amazon_p5", "beauty")) / "sequential_data.txt"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return np.array([len(line.split()) - 1 for line in lines if line.strip()]), "Amazon Beauty"
    if raw_dir is not None:
        raise InputError(f"{file} does not exist. Give --raw-dir the folder that holds sequential_data.txt.")
    return 4 + np.random.default_rng(0).geometric(1 / 4.9, size=22363), "SYNTHETIC lengths (no real data found)"


def build_batches(lengths: np.ndarray, batch_size: int, num_items: int = 12101) -> TrainingBatches:
    """Every prefix of each history without its last two items, over random items."""
    generator = torch.Generator().manual_seed(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_users, num_interactions = len(lengths), int(offsets[-1])
    histories = Histories(
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        item_ids=torch.randint(num_items, (num_interactions,), generator=generator, dtype=torch.int32),
        timestamps=torch.arange(num_interactions),
        user_hashes=torch.randint(1 << 62, (num_users,), generator=generator),
    )
    rows = torch.arange(num_users, dtype=torch.int32)
    ends = torch.from_numpy(lengths.astype(np.int32) - 3).clamp_(min=0)
    ranges = Ranges(rows=rows, begins=torch.zeros_like(rows), ends=ends)
    return TrainingBatches(
        histories,
        ranges,
        strategy=ExampleStrategy.EVERY_PREFIX,
        max_history=MAX_HISTORY,
        batch_size=batch_size,
        seed=0,
    )


class Contender:
    """One model with its optimizer; `step` trains on one batch and returns the loss per level."""

    def __init__(self, network: nn.Module, loss: Callable[[TokenizedSeqBatch], Tensor], *, bf16: bool) -> None:
        self.network = network.train()
        self._loss = loss
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        self._bf16 = bf16

    def step(self, batch: TokenizedSeqBatch) -> float:
        """Forward, backward and optimizer step."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16) if self._bf16 else nullcontext():
            loss = self._loss(batch)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def contenders(model: EncoderDecoderRetrievalModel, *, bf16: bool) -> dict[str, Contender]:
    """Ours and T5 in both attention implementations, all starting from the same weights."""
    found = {"ours": Contender(model, lambda batch: model(batch)["loss"] / model.num_levels, bf16=bf16)}
    for attention in ("eager", "sdpa"):
        t5 = build_t5(model, attention)

        def loss(batch: TokenizedSeqBatch, t5: nn.Module = t5) -> Tensor:
            return t5(**t5_inputs(batch, model)).loss

        found[f"hf_t5_{attention}"] = Contender(t5, loss, bf16=bf16)
    return found


def verify(model: EncoderDecoderRetrievalModel, batch: TokenizedSeqBatch) -> None:
    """Stop unless our per-row losses and a gradient equal those of padded T5 with the same weights, dropout off."""
    t5 = build_t5(model, "eager").eval()
    model.eval()
    expected = t5_level_losses(t5(**t5_inputs(batch, model)).logits, batch, model).sum(dim=1)
    got = -model.log_likelihood(batch)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), [t5.shared.weight])
    (gradient,) = torch.autograd.grad(got.mean(), [model.embedding.weight])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-5)
    print(f"verified: losses of {len(batch)} rows and the token table's gradient equal those of padded T5")


@contextmanager
def peak_memory(result: dict[str, float]) -> Iterator[None]:
    """Put the growth of resident memory inside the block into result["peak_mb"] (Linux; nothing elsewhere)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        yield
        return

    def field(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    yield
    result["peak_mb"] = round(field("VmHWM") - before, 1)


def time_steps(
    entrants: dict[str, Contender],
    batches: TrainingBatches,
    tokenizer: SequenceTokenizer,
    num_steps: int,
) -> tuple[dict[str, list[float]], list[float], dict[str, list[float]]]:
    """Seconds of every step per contender in turn, of batching, and losses, after two steps of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in entrants}
    losses: dict[str, list[float]] = {name: [] for name in entrants}
    batching: list[float] = []
    for step in range(num_steps + 2):
        start = time.perf_counter()
        batch = tokenizer(batches.batch(step))
        batching.append(time.perf_counter() - start)
        for name, entrant in entrants.items():
            start = time.perf_counter()
            losses[name].append(entrant.step(batch))
            times[name].append(time.perf_counter() - start)
        times["ours"][-1] += batching[-1]
    return {name: values[2:] for name, values in times.items()}, batching[2:], losses


def measure(case: str, batch_size: int, num_steps: int, lengths: np.ndarray, *, bf16: bool) -> list[dict[str, object]]:
    """Result rows of one precision."""
    torch.manual_seed(0)
    config = RetrievalModelConfig(languages={"text": LEVEL_SIZES})
    model = EncoderDecoderRetrievalModel(config)
    semantic_ids = torch.stack([torch.randint(size, (12101,)) for size in LEVEL_SIZES], dim=1)
    tokenizer = SequenceTokenizer(semantic_ids, model.vocabulary)
    batches = build_batches(lengths, batch_size)
    verify(model, tokenizer(batches.batch(0)))
    entrants = contenders(model, bf16=bf16)
    times, batching, losses = time_steps(entrants, batches, tokenizer, num_steps)
    baseline = min(statistics.median(times[name]) for name in entrants if name != "ours")
    rows = []
    for name, entrant in entrants.items():
        row: dict[str, object] = {"case": case, "implementation": name, **summarize(times[name])}
        memory: dict[str, float] = {}
        with peak_memory(memory):
            entrant.step(tokenizer(batches.batch(0)))
        row |= memory
        row["speed_vs_fastest_hf"] = round(baseline / statistics.median(times[name]), 2)
        row["loss_first"], row["loss_last"] = round(losses[name][0], 3), round(losses[name][-1], 3)
        if name == "ours":
            row["batching_share"] = round(statistics.median(batching) / statistics.median(times[name]), 4)
        rows.append(row)
    return rows


def main() -> None:
    """Parse, verify, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--quick", action="store_true", help="few steps, fp32 only")
    parser.add_argument("--raw-dir", type=Path, help="folder with sequential_data.txt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        lengths, source = read_lengths(arguments.raw_dir)
    except InputError as error:
        parser.error(str(error))
    case = f"{source}, batch {arguments.batch_size}, d_model 128, {arguments.threads} threads"
    rows = measure(f"{case}, fp32", arguments.batch_size, 3 if arguments.quick else 20, lengths, bf16=False)
    if not arguments.quick:
        rows += measure(f"{case}, bf16 autocast", arguments.batch_size, 8, lengths, bf16=True)
    print_table(rows)
    write_result("train_step", rows, device=arguments.device, quick=arguments.quick)


if __name__ == "__main__":
    main()
