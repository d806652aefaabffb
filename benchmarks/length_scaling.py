"""Claim: the cost of training grows linearly with tokens for everything but attention, up to 1,024 items a history.

Whole training steps (forward, backward, AdamW) at d_model 128 for histories of 16, 32, ..., 1,024 items, the same
number of rows each. Every step is timed twice in turn: as it is, and with attention taken out, where a cheap function
stands in that passes gradients on to queries, keys and values. The second time is the cost of everything but attention;
the difference is attention's. The claim holds where the second time per token, at 1,024 items, is at most 1.3 times its
largest value at 64 and 128 items. On a GPU steps are replayed as CUDA graphs, so that launches do not hide the rest.

    python -m benchmarks.length_scaling            # writes length_scaling.json and length_scaling.svg
    python -m benchmarks.length_scaling --quick    # up to 128 items
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ops
from benchmarks.common import begin, finish, interleaved, parser, summarize
from benchmarks.histories import LEVEL_SIZES
from data.schemas import TokenizedSeqBatch
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from ops.graphs import GraphedCall
from training.cli import run_cli

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
MAX_GROWTH = 1.3

Step = Callable[[TokenizedSeqBatch], Tensor]


@contextmanager
def without_attention() -> Iterator[list[int]]:
    """Attention ops become cheap stand-ins; yields a list whose only entry counts the calls."""
    calls = [0]

    def jagged_self_attention(qkv: Tensor, offsets: Tensor, **options: Any) -> Tensor:
        calls[0] += 1
        return qkv.sum(1)

    def jagged_attention(q: Tensor, kv: Tensor, offsets_q: Tensor, offsets_k: Tensor, **options: Any) -> Tensor:
        calls[0] += 1
        return q + kv.sum((0, 1)) / len(kv)

    with (
        mock.patch.object(ops, "jagged_self_attention", jagged_self_attention),
        mock.patch.object(ops, "jagged_attention", jagged_attention),
    ):
        yield calls


def build_batch(model: EncoderDecoderRetrievalModel, num_rows: int, num_items: int, device: str) -> TokenizedSeqBatch:
    """Rows of one length: a user token and random codes, with random targets."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(size, (num_rows, num_items), generator=generator) for size in LEVEL_SIZES], 2)
    codes += torch.tensor(model.vocabulary.level_offsets(model.language))
    users = model.vocabulary.user_tokens(torch.randint(1 << 62, (num_rows, 1), generator=generator))
    length = 1 + num_items * len(LEVEL_SIZES)
    return TokenizedSeqBatch(
        tokens=torch.cat([users, codes.flatten(1)], dim=1).flatten().to(device),
        offsets=(torch.arange(num_rows + 1, dtype=torch.int32) * length).to(device),
        max_len=length,
        target_codes=torch.stack([torch.randint(size, (num_rows,), generator=generator) for size in LEVEL_SIZES], 1).to(
            device
        ),
    )


def build_step(
    model: EncoderDecoderRetrievalModel, device: str, *, bf16: bool
) -> Callable[[TokenizedSeqBatch], Tensor]:
    """Forward, backward and optimizer step; the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=device != "cpu")

    def step(batch: TokenizedSeqBatch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def rest_of(step: Step, num_attentions: int) -> Step:
    """The step without attention."""

    def rest(batch: TokenizedSeqBatch) -> Tensor:
        with without_attention() as calls:
            loss = step(batch)
        assert calls == [num_attentions], "the model's attention did not go through ops"
        return loss

    return rest


def run(lengths: Sequence[int], *, num_rows: int, num_layers: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """One result row per history length."""
    torch.manual_seed(0)
    config = RetrievalModelConfig(
        languages={"text": LEVEL_SIZES}, num_encoder_layers=num_layers, num_decoder_layers=num_layers
    )
    model = EncoderDecoderRetrievalModel(config).to(device).train()
    step = build_step(model, device, bf16=device != "cpu")
    rows = []
    for num_items in lengths:
        batch = build_batch(model, num_rows, num_items, device)
        calls = {
            name: GraphedCall(function, device=torch.device(device), name=name)
            for name, function in (("step", step), ("rest", rest_of(step, 3 * num_layers)))
        }
        contenders = {name: partial(call, batch) for name, call in calls.items()}
        seconds = interleaved(contenders, repeats=repeats, device=device)
        whole, others = summarize(seconds["step"]), summarize(seconds["rest"])
        tokens = len(batch.tokens)
        rows.append(
            {
                "case": f"{num_rows} rows of {num_items} items, {num_layers} + {num_layers} layers",
                "implementation": "ours",
                "items": num_items,
                "tokens": tokens,
                **whole,
                "rest_ms": others["median_ms"],
                "attention_ms": round(whole["median_ms"] - others["median_ms"], 4),
                "graphed": all(call.num_recorded for call in calls.values()),
                "rest_us_per_token": round(1000 * others["median_ms"] / tokens, 3),
            }
        )
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Growth of the cost per token of everything but attention, and whether the claim holds; None if not measured."""
    cost = {row["items"]: row["rest_us_per_token"] for row in rows}
    if not {64, 128, 1024} <= cost.keys():
        return None
    growth = round(cost[1024] / max(cost[64], cost[128]), 3)
    return {"case": "claim", "growth_per_token": growth, "at_most": MAX_GROWTH, "holds": growth <= MAX_GROWTH}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time against tokens, and time per token of everything but attention."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "length_scaling"  # the same figure gives the same file
    from matplotlib import pyplot

    tokens = [row["tokens"] for row in rows]
    figure, (times, costs) = pyplot.subplots(1, 2, figsize=(10, 4))
    for key, label in (("median_ms", "step"), ("attention_ms", "attention"), ("rest_ms", "everything else")):
        times.plot(tokens, [row[key] for row in rows], marker="o", label=label)
    times.set(xscale="log", yscale="log", xlabel="tokens in the batch", ylabel="ms")
    times.legend()
    costs.plot([row["items"] for row in rows], [row["rest_us_per_token"] for row in rows], marker="o")
    costs.set(xscale="log", xlabel="items per history", ylabel="µs per token, attention left out", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """Measure, judge, plot, write."""
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--rows", type=int, help="histories per batch; default: 4 on a CPU, 16 on a GPU")
    arguments_of.add_argument("--layers", type=int, help="of each stack; default: 2 on a CPU, 4 on a GPU")
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    rows = run(
        LENGTHS[:4] if arguments.quick else LENGTHS,
        num_rows=arguments.rows or (4 if device == "cpu" else 16),
        num_layers=arguments.layers or (2 if device == "cpu" else 4),
        device=device,
        repeats=3 if arguments.quick else 10,
    )
    judged = verdict(rows)
    path = finish("length_scaling", [*rows, *([judged] if judged else [])], arguments, device)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        plot(rows, path.with_suffix(".svg"))
    return 0 if judged is None or judged["holds"] else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
