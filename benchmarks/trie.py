"""Claim: the trie of 10 million items of four codes is built in seconds and takes at most 200 MB.

On an H100: a step over a catalogue of 20 million items in at most 0.05 ms.

Codes are random, with a dedup code where items share the others. Verified: the leaves' paths are the items' codes, in
ascending order, every item once; and every child that a step returns continues its parent. `resident_mb` includes
`filters_mb`, what filters per request need; `level_mb` is the memory of every level, 4 bytes per item come on top.
Steps are at batch 256 (64 on a CPU) and beam 20, over random nodes of the level, 256 codes each.

    ours                   sorted into compressed sparse rows
    python_dict            prefix -> codes, as `prefix_allowed_tokens_fn` looks them up; 100,000 items
    trie_topk_step         one step per level, of the catalogues with 256 codes per level

    python -m benchmarks.trie
    python -m benchmarks.trie --quick     # 100,000 items
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ops
from benchmarks.catalogues import memory_mb, random_semantic_ids
from benchmarks.common import begin, finish, interleaved, parser, peak_memory, ratios, summarize
from benchmarks.hf_generate import allowed_tokens
from benchmarks.rungs import OURS
from data.schemas import ItemFilter
from modules.generation.trie import PrefixTrie
from training.cli import run_cli

CLAIM_ITEMS = 10_000_000
CLAIM_MB = 200
CLAIM_SECONDS = 10
CLAIM_STEP_ITEMS = 20_000_000
CLAIM_STEP_MS = 0.05
DICT_ITEMS = 100_000
SIZES = {"256 x 3 + dedup": (256,) * 3, "1,024 x 3 + dedup": (1024,) * 3}
WIDE = {"65,536 x 3 + dedup, codes of 4 bytes, no claim": (65536,) * 3}
BEAM_WIDTH = 20


def paths(trie: PrefixTrie) -> Tensor:
    """[N, L] codes of every leaf, in leaf order."""
    columns: list[Tensor] = []
    for level in trie.levels:
        parents = torch.repeat_interleave(level.row_ptr.diff(), output_size=len(level.codes))
        columns = [*(column[parents] for column in columns), level.codes.long()]
    return torch.stack(columns, dim=1)


def verify(trie: PrefixTrie, semantic_ids: Tensor) -> None:
    """Stop unless the trie holds every item under its codes, in ascending order.

    Raises:
        AssertionError: if it does not.
    """
    found, items = paths(trie), trie.leaf_items.long()
    assert torch.equal(items.sort().values, torch.arange(len(semantic_ids), device=items.device)), "items are missing"
    assert torch.equal(found, semantic_ids[items]), "a leaf's path is not its item's codes"
    differs = found[1:] - found[:-1]
    first = (differs != 0).int().argmax(dim=1, keepdim=True)
    assert bool((differs.gather(1, first) > 0).all()), "leaves are not in ascending order"


def build_rows(name: str, semantic_ids: Tensor, *, repeats: int) -> tuple[list[dict[str, Any]], PrefixTrie]:
    """Result rows of one catalogue, and its trie."""
    device = semantic_ids.device.type
    trie = PrefixTrie.from_semantic_ids(semantic_ids)
    verify(trie, semantic_ids)
    runs: dict[str, Callable[[], object]] = {OURS: partial(PrefixTrie.from_semantic_ids, semantic_ids)}
    if len(semantic_ids) <= DICT_ITEMS:
        runs["python_dict"] = partial(allowed_tokens, semantic_ids)
    case = f"build, {len(semantic_ids):,} items, {name}"
    rows = {run: {"case": case, "implementation": run, "items": len(semantic_ids)} for run in runs}
    for run, function in runs.items():
        with peak_memory(rows[run], device):
            function()
    for run, seconds in interleaved(runs, repeats=repeats, warmup=0, device=device).items():
        rows[run] |= summarize(seconds)
    for run, ratio in ratios(list(rows.values()), of=OURS).items():
        rows[run]["times_ours"] = ratio
    level_mb = [round(memory_mb(level), 2) for level in trie.levels]
    without_filters = memory_mb(trie)
    _use_filters(trie)
    resident = memory_mb(trie)
    rows[OURS] |= {"resident_mb": round(resident, 1), "filters_mb": round(resident - without_filters, 1)}
    rows[OURS]["level_mb"] = level_mb
    return list(rows.values()), trie


def _use_filters(trie: PrefixTrie) -> None:
    """Have the trie make what filters need, which it keeps."""
    trie.leaf_filter(ItemFilter.from_lists([[0]]).to(trie.device))
    assert len(trie.leaf_begins) == trie.num_levels


def step_rows(trie: PrefixTrie, num_codes: int, *, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Result rows of a step over every level of a trie."""
    device = trie.device.type
    generator = torch.Generator(device).manual_seed(0)
    rows = []
    for number, level in enumerate(trie.levels):
        num_nodes = len(level.row_ptr) - 1
        shape = (batch_size, min(BEAM_WIDTH, num_nodes))
        nodes = torch.randint(num_nodes, shape, generator=generator, device=device).sort(dim=1).values
        logits = torch.randn(*shape, num_codes, generator=generator, device=device)
        step = partial(
            ops.trie_topk_step,
            logits,
            nodes,
            torch.zeros(shape, device=device),
            level.row_ptr,
            level.codes,
            beam_width=min(BEAM_WIDTH, len(level.codes)),
        )
        parents, codes, children, _ = step()
        found, above = children >= 0, nodes.gather(1, parents)
        continues = (level.row_ptr[above] <= children) & (children < level.row_ptr[above + 1])
        continues &= level.codes[children.clamp(min=0)] == codes
        assert bool((continues | ~found).all()), f"a child of level {number} does not continue its parent"
        seconds = interleaved({"step": step}, repeats=repeats, device=device, on_device=True)["step"]
        case = f"level {number}, {trie.num_items:,} items, batch {batch_size}, beam {BEAM_WIDTH}"
        sizes = {"items": trie.num_items, "nodes": num_nodes}
        rows.append({"case": case, "implementation": "trie_topk_step", **sizes, **summarize(seconds)})
    return rows


def verdict(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What was claimed of this device, as far as it was measured."""
    claims = []
    for row in rows:
        if row.get("items") == CLAIM_ITEMS and "resident_mb" in row and "no claim" not in row["case"]:
            holds = row["resident_mb"] <= CLAIM_MB and row["median_ms"] <= 1000 * CLAIM_SECONDS
            claims.append({"case": f"claim: {row['case']}, at most {CLAIM_MB} MB and {CLAIM_SECONDS} s"})
            claims[-1] |= {"resident_mb": row["resident_mb"], "median_ms": row["median_ms"], "holds": holds}
    steps = [row for row in rows if row["implementation"] == "trie_topk_step" and row["items"] == CLAIM_STEP_ITEMS]
    if device == "cuda" and steps:
        slowest = max(row["median_ms"] for row in steps)
        claims.append({"case": f"claim: a step in at most {CLAIM_STEP_MS} ms", "median_ms": slowest})
        claims[-1]["holds"] = slowest <= CLAIM_STEP_MS
    return claims


def main(argv: Sequence[str]) -> int:
    """Verify, measure, judge, write."""
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--items", type=int, nargs="+", help="default: 100,000 and 10 million; on a GPU also 20")
    arguments = arguments_of.parse_args(argv)
    device, quick = begin(arguments), arguments.quick
    repeats = 2 if quick else 5
    sizes = [DICT_ITEMS] if quick else [DICT_ITEMS, CLAIM_ITEMS, *([CLAIM_STEP_ITEMS] if device == "cuda" else [])]
    rows: list[dict[str, Any]] = []
    for num_items in arguments.items or sizes:
        for name, level_sizes in (SIZES | (WIDE if num_items == CLAIM_ITEMS else {})).items():
            semantic_ids = random_semantic_ids(num_items, level_sizes).to(device)
            built, trie = build_rows(name, semantic_ids, repeats=repeats)
            rows += built
            del semantic_ids
            if level_sizes[0] == 256:
                batch_size = 256 if device == "cuda" else 64
                rows += step_rows(trie, 256, batch_size=batch_size, repeats=10 * repeats)
    claims = verdict(rows, device)
    finish("trie", [*rows, *claims], arguments, device)
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
