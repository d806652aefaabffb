"""Claim: on a CPU, the 20 best of 1 million items x 128 for 1,024 queries in a process of at most 2 GB, inputs and all;
1,000 items are added to the projections of a catalogue of Beauty's size in less than a second.

Verified first: for a part of the queries the lists are those of a full product in double precision, rounded to fp32,
equal scores by item id; one vector in ten is there twice. Every implementation of a search runs in a process of its
own: `peak_mb` is what it takes beyond its inputs, `process_mb` the whole process.

    ours                 search: `search_catalogue`, exact, in blocks; adding: `ProjectedItems.refresh`
    torch_full_scores    one product of all queries and items, and `torch.topk`; ties and rounding as they fall
    project_all          adding: the whole catalogue projected again

    python -m benchmarks.dense_scoring
    python -m benchmarks.dense_scoring --quick     # 50,000 items, 64 queries; no claim
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import REPOSITORY, begin, finish, interleaved, measure, parser, peak_memory, ratios, summarize
from benchmarks.rungs import OURS
from modules.catalogue_search import search_catalogue
from modules.dense.projected_items import ProjectedItems
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel
from modules.model_config import RetrievalModelConfig
from training.cli import run_cli

BASELINE = "torch_full_scores"
K = 20
WIDTH = 128
CASES = ((12_101, 256), (1_000_000, 1024))
QUICK_CASES = ((12_101, 256), (50_000, 64))
CLAIM_ITEMS = 1_000_000
CLAIM_MB = 2000
CLAIM_ADDING_MS = 1000
VERIFIED_QUERIES = 16
BEAUTY_ITEMS = 12_101
ADDED_ITEMS = 1000
FEATURES = 768


def inputs(num_items: int, num_queries: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Queries and item vectors of unit length; the last tenth of the vectors repeats the first one."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.empty(num_items, WIDTH)
    for block in vectors.split(1 << 14):  # a temporary of all of them would count as memory
        block.normal_(generator=generator)
        block /= block.norm(dim=1, keepdim=True)
    num_repeated = num_items // 10
    vectors[num_items - num_repeated :] = vectors[:num_repeated]
    queries = torch.nn.functional.normalize(torch.randn(num_queries, WIDTH, generator=generator))
    return queries.to(device), vectors.to(device)


def full_scores(queries: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Item ids and scores from one product."""
    scores, item_ids = (queries @ vectors.T).topk(K, dim=1)
    return item_ids, scores


SEARCHES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    OURS: lambda queries, vectors: search_catalogue(queries, vectors, K, ranker="benchmark"),
    BASELINE: full_scores,
}


def verify(queries: Tensor, vectors: Tensor) -> None:
    """Stop unless the lists of the first queries are those of double precision.

    Raises:
        AssertionError: if they are not.
    """
    queries = queries[:VERIFIED_QUERIES]
    exact = (queries.double() @ vectors.double().T).float()
    expected, order = exact.sort(dim=1, descending=True, stable=True)
    item_ids, scores = SEARCHES[OURS](queries, vectors)
    if not (torch.equal(item_ids, order[:, :K]) and torch.equal(scores, expected[:, :K])):
        raise AssertionError("the lists are not those of double precision; nothing is reported.")
    print(f"verified: the lists of {len(queries)} queries in {len(vectors):,} items equal those of double precision")


def search_alone(name: str, sizes: tuple[int, int, int], device: str) -> dict[str, Any]:
    """What a process of its own finds of one implementation: `seconds`, `peak_mb` and `process_mb`.

    Args:
        name: of the implementation.
        sizes: items, queries, repeats.
        device: where it runs.
    """
    num_items, num_queries, repeats = sizes
    search = partial(SEARCHES[name], *inputs(num_items, num_queries, device))
    found: dict[str, Any] = {}
    with peak_memory(found, device):
        search()
    if "peak_mb" in found and device == "cpu":
        found["process_mb"] = round(peak_of_process_mb(), 1)
    return found | {"seconds": measure(search, repeats=repeats, warmup=0, device=device)}


def peak_of_process_mb() -> float:
    """Resident memory at its most since the process was last asked to forget it (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def run_alone(name: str, num_items: int, num_queries: int, repeats: int, arguments: argparse.Namespace) -> Any:
    """`search_alone` in a process of its own.

    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.dense_scoring", "--alone", name, "--device", arguments.device]
    command += ["--sizes", *map(str, (num_items, num_queries, repeats)), "--threads", str(arguments.threads)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} did not search {num_items:,} items:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def search_rows(
    num_items: int, num_queries: int, arguments: argparse.Namespace, *, rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """Result rows of one size; the implementations' processes take turns."""
    found: dict[str, list[Any]] = {name: [] for name in SEARCHES}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(run_alone(name, num_items, num_queries, repeats, arguments))
    case = f"{num_items:,} items x {WIDTH}, {num_queries:,} queries, k {K}"
    rows = []
    for name, results in found.items():
        seconds = [second for result in results for second in result["seconds"]]
        memory = {key: max(result[key] for result in results) for key in ("peak_mb", "process_mb") if key in results[0]}
        rows.append({"case": case, "implementation": name, **summarize(seconds), **memory})
    rows[0] |= {"times_ours": 1.0}
    rows[1] |= {"times_ours": ratios(rows, of=OURS)[BASELINE]}
    return rows


def adding_rows(num_items: int, num_added: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Result rows of items that are added to a projected catalogue, until their unit vectors are there."""
    torch.manual_seed(0)
    config = RetrievalModelConfig(
        languages={"text": (256, 256, 256)}, items=ItemInputConfig(num_features=FEATURES), embedding_loss_weight=1.0
    )
    model = EncoderDecoderRetrievalModel(config).to(device).eval()
    flags = torch.zeros(num_items, dtype=torch.bool)
    before = ItemTable(torch.randn(num_items, FEATURES), flags, flags)
    after = before.with_rows(torch.arange(num_items, num_items + num_added), torch.randn(num_added, FEATURES))
    projected = ProjectedItems(model, before)

    def refreshed() -> Tensor:
        projected.refresh(after)
        return projected.unit()

    def taken_back() -> None:
        projected.refresh(before)
        projected.unit()

    torch.testing.assert_close(refreshed(), ProjectedItems(model, after).unit(), rtol=1e-4, atol=1e-5)
    contenders = {OURS: refreshed, "back": taken_back, "project_all": lambda: ProjectedItems(model, after).unit()}
    seconds = interleaved(contenders, repeats=repeats, warmup=1, device=device)
    del seconds["back"]
    case = f"{num_added:,} items added to {num_items:,}, features of {FEATURES}"
    rows = [{"case": case, "implementation": name, **summarize(times)} for name, times in seconds.items()]
    rows[0] |= {"times_ours": 1.0}
    rows[1] |= {"times_ours": ratios(rows, of=OURS)["project_all"]}
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims, where they were measured."""
    ours = [row for row in rows if row["implementation"] == OURS]
    claims = []
    for row in ours:
        if row["case"].startswith(f"{CLAIM_ITEMS:,} items") and "process_mb" in row:
            case = f"claim: {CLAIM_ITEMS:,} items in a process of at most {CLAIM_MB:,} MB"
            claims.append({"case": case, "process_mb": row["process_mb"], "holds": row["process_mb"] <= CLAIM_MB})
        if row["case"].startswith(f"{ADDED_ITEMS:,} items added"):
            case = f"claim: {ADDED_ITEMS:,} items added in less than {CLAIM_ADDING_MS:,} ms"
            claims.append({"case": case, "median_ms": row["median_ms"], "holds": row["median_ms"] < CLAIM_ADDING_MS})
    return claims


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    made = parser(__doc__)
    made.add_argument(
        "--alone", choices=list(SEARCHES), help=argparse.SUPPRESS
    )  # of the processes that this one starts
    made.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = made.parse_args(argv)
    device, quick = begin(arguments), arguments.quick
    if arguments.alone is not None:
        print(json.dumps(search_alone(arguments.alone, arguments.sizes, device)))
        return 0
    rows: list[dict[str, Any]] = []
    for num_items, num_queries in QUICK_CASES if quick else CASES:
        verify(*inputs(num_items, num_queries, device))
        few = quick or num_items == CLAIM_ITEMS
        rows += search_rows(num_items, num_queries, arguments, rounds=1 if quick else 3, repeats=2 if few else 10)
    rows += adding_rows(BEAUTY_ITEMS, ADDED_ITEMS, 3 if quick else 20, device)
    claims = [] if quick else verdict(rows)
    finish("dense_scoring", [*rows, *claims], arguments, device)
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
