"""Claim: beam search is at least 8 times as fast as Hugging Face's `generate` on a CPU, and its memory is the trie's.

At batch 64 and beam 20, for a catalogue and a model of Amazon Beauty's size, with `prefix_allowed_tokens_fn` and
without, in the same dtype on the same threads. On an H100: batch 256 in at most 1.5 ms at beam 20 and 3 ms at beam 50,
batch 1 in at most 1 ms at beam 20.

All sides have the same weights (random) and the same histories: as many items as real users have, the newest left out,
at most 20; codes are random. Our time goes from item ids to item ids; T5's inputs are ready, tokenized and padded, and
it ends with tokens. Our lists are verified against Hugging Face's first: with log-probabilities over a level (by a
logits processor before the constraint's) and over allowed children (`renormalize_logits`). What is timed of Hugging
Face leaves that extra step out. `valid_share` is the share of its results that are items.

    ours                          scores over the level's codes
    ours_children                 scores over the children of a prefix
    ours_graphed                  as ours, one CUDA graph
    dense_mask                    our decoder, with a table [prefixes, codes] of children and a top-k over all codes
    hf_generate                   T5 with SDPA, no constraint: most results of an untrained model are no items
    hf_generate_eager             T5 with its own attention
    hf_generate_prefix_allowed    T5 with SDPA, prefixes looked up in a dictionary of ready tensors
    hf_generate_prefix_allowed_eager

    python -m benchmarks.beam_search                              # also growth with beam width and catalogue
    python -m benchmarks.beam_search --quick                      # batch 16, two widths, one catalogue
    python -m benchmarks.beam_search --widths 20 200 --catalogues 1000000
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.beam_rungs import (
    BY_CATALOGUE,
    BY_WIDTH,
    RUNGS,
    Lists,
    Rung,
    Setting,
    build_generator,
    build_model,
    build_setting,
    dense_mask,
)
from benchmarks.common import begin, finish, interleaved, parser, peak_memory, ratios, summarize
from benchmarks.hf_t5 import has_transformers
from benchmarks.histories import NUM_ITEMS, add_lengths_argument, read_lengths
from benchmarks.rungs import OURS, reason_of
from data.schemas import NO_ITEM
from training.cli import run_cli

MAIN_WIDTH = 20
TIMES_HF = 8
TIMES_HF_BATCH = 64
GPU_LIMITS_MS = {(256, 20): 1.5, (256, 50): 3.0, (1, 20): 1.0}
"""By batch and beam width."""
TOLERANCE = 1e-4
"""Between scores, which are sums of a handful of log-probabilities."""
MIN_AGREEING = 0.9
"""Share of lists that must agree: where two prefixes are near-tied for the last place of a step, rounding decides which
items can be found, once in some dozen lists."""
SECONDS = 60
"""That the rounds of a case may take, at least three rounds though."""

Facts = dict[str, dict[str, Any]]
"""Parts of result rows, by implementation."""


def agreement(found: Lists, expected: Lists, tolerance: float = TOLERANCE) -> float:
    """Share of rows whose lists agree: in every score, and in every item that is not near-tied with a neighbour.

    The last item may differ, for its neighbour beyond the list is not known.

    Args:
        found: item ids and scores, [B, W] each, best first.
        expected: the same.
        tolerance: difference of scores that rounding explains.
    """
    (item_ids, scores), (expected_ids, expected_scores) = found, expected
    equal_scores = (scores == expected_scores) | ((scores - expected_scores).abs() <= tolerance)
    gaps = torch.nn.functional.pad(scores[:, :-1] - scores[:, 1:], (1, 1), value=torch.inf)
    gaps[:, -1] = 0.0
    near_tied = torch.minimum(gaps[:, :-1], gaps[:, 1:]) <= tolerance
    agrees = equal_scores & ((item_ids == expected_ids) | near_tied)
    return round(float(agrees.all(dim=1).double().mean()), 4)


def overlap(found: Lists, expected: Lists) -> float:
    """Share of the expected items that were found, in whatever order."""
    there = (expected[0][:, :, None] == found[0][:, None, :]).any(dim=2)
    return round(float(there[expected[0] != NO_ITEM].double().mean()), 4)


def verify(setting: Setting, rungs: Mapping[str, Rung], beam_width: int) -> Facts:
    """How the lists compare: ours with Hugging Face's, or the dense mask's without transformers; others with ours.

    In bf16, where near ties are everywhere, only the overlap is told.

    Raises:
        AssertionError: if fp32 lists differ, so that nothing is reported.
    """
    lists = {name: rung.lists(beam_width) for name, rung in rungs.items() if rung.lists is not None}
    expected = {name: lists[OURS] for name in lists if name not in (OURS, "ours_children")}
    found: Facts = {}
    if has_transformers():
        generator = build_generator(setting)
        with setting.autocast():
            expected |= {OURS: generator.lists(beam_width, "level")}
            expected |= {"ours_children": generator.lists(beam_width, "children")} if "ours_children" in lists else {}
            free = generator.lists(beam_width, "tokens")[0]
            constrained = generator.items(generator.generate(beam_width, constrained=True))
        found["hf_generate"] = {"valid_share": _share_of_items(free)}
        found["hf_generate_prefix_allowed"] = {"valid_share": _share_of_items(constrained)}
    else:
        oracle = dense_mask(setting).lists
        assert oracle is not None
        expected |= {OURS: oracle(beam_width)}
    for name, of_others in expected.items():
        if setting.dtype != "fp32":
            found[name] = {"overlap": overlap(lists[name], of_others)}
            continue
        share = agreement(lists[name], of_others)
        found[name] = {"equal_lists": share}
        if share < MIN_AGREEING:
            raise AssertionError(
                f"{share:.0%} of the lists of {name} are as expected, at least {MIN_AGREEING:.0%} must be; "
                "nothing is reported."
            )
    print("verified:", ", ".join(f"{name} {key} {value}" for name, one in found.items() for key, value in one.items()))
    return found


def _share_of_items(item_ids: Tensor) -> float:
    return round(float((item_ids != NO_ITEM).double().mean()), 4)


def build_rungs(setting: Setting, names: Iterable[str]) -> tuple[dict[str, Rung], Facts]:
    """The contenders that can run; and of all of them what they keep per catalogue, or why there is none."""
    rungs: dict[str, Rung] = {}
    facts: Facts = {}
    for name in names:
        start = perf_counter()
        try:
            rung = RUNGS[name](setting)
        except Exception as error:  # a contender that cannot run is a result too; ours must
            if name == OURS:
                raise
            facts[name] = {"note": f"n/a: {reason_of(error)}"}
            continue
        rungs[name], facts[name] = rung, {}
        if rung.resident_mb is not None:
            seconds = round(perf_counter() - start, 3)
            facts[name] = {"build_s": seconds, "resident_mb": round(rung.resident_mb, 1)}
    return rungs, facts


def run_case(
    case: str, setting: Setting, rungs: Mapping[str, Rung], facts: Facts, width: int, *, rounds: int
) -> list[dict[str, Any]]:
    """Result rows of one batch and beam width.

    Args:
        case: where the histories come from.
        setting: with the batch.
        rungs: the contenders that can run.
        facts: of the contenders that get rows.
        width: of the beam.
        rounds: at most; fewer where they take long.
    """
    sizes = {"batch": len(setting.histories), "beam_width": width, "items": len(setting.semantic_ids)}
    case = f"{case}, batch {sizes['batch']}, beam {width}, {sizes['items']:,} items, {setting.dtype}"
    rows: Facts = {name: {"case": case, "implementation": name, **sizes, **facts[name]} for name in facts}
    runs: dict[str, Callable[[], object]] = {}
    seconds = 0.0
    for name in [name for name in facts if name in rungs]:
        run = partial(rungs[name].search, width)
        try:
            run()
            start = perf_counter()
            with peak_memory(rows[name], setting.device):
                run()
            seconds += perf_counter() - start
            runs[name] = run
        except Exception as error:
            if name == OURS:
                raise
            rows[name]["note"] = f"n/a: {reason_of(error)}"
    rounds = max(min(rounds, int(SECONDS / seconds)), 3)
    for name, values in interleaved(runs, repeats=rounds, warmup=0, device=setting.device).items():
        rows[name] |= summarize(values)
    for name, ratio in ratios(list(rows.values()), of=OURS).items():
        rows[name]["times_ours"] = ratio
    return list(rows.values())


def run_beauty(
    case: str, setting: Setting, single: Setting, *, widths: Sequence[int], names: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Rows of a batch at every beam width, and of a single history.

    Args:
        case: where the histories come from.
        setting: the batch.
        single: the same with one history.
        widths: of the beam; at 20, or the largest, all contenders take part.
        names: of the contenders.
        rounds: as in `run_case`.
    """
    main_width = MAIN_WIDTH if MAIN_WIDTH in widths else max(widths)
    rungs, facts = build_rungs(setting, names)
    verified = verify(setting, rungs, max(main_width, 2))
    rows = []
    for width in widths:
        if width == main_width:
            chosen = {name: facts[name] | verified.get(name, {}) for name in facts}
        else:
            chosen = {name: facts[name] for name in facts if name in BY_WIDTH}
        rows += run_case(case, setting, rungs, chosen, width, rounds=rounds)
    rungs, facts = build_rungs(single, [name for name in names if name in BY_WIDTH])
    return rows + run_case(case, single, rungs, facts, main_width, rounds=rounds)


def verdict(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What was claimed of this device, as far as it was measured."""
    beauty = [row for row in rows if row.get("items") == NUM_ITEMS and "median_ms" in row]
    claims = []
    if device == "cpu":
        size = (TIMES_HF_BATCH, MAIN_WIDTH)
        for name in ("hf_generate", "hf_generate_prefix_allowed"):
            times = [row["times_ours"] for row in _of_size(beauty, *size) if row["implementation"] in _both(name)]
            if times:
                claims.append(_claim(f"at least {TIMES_HF} times {name}", min(times), min(times) >= TIMES_HF))
        return claims
    for size, limit in GPU_LIMITS_MS.items():
        times = [row["median_ms"] for row in _of_size(beauty, *size) if row["implementation"].startswith(OURS)]
        if times:
            name = f"at most {limit} ms at batch {size[0]}, beam {size[1]}"
            claims.append(_claim(name, min(times), min(times) <= limit))
    return claims


def _both(name: str) -> tuple[str, str]:
    return name, f"{name}_eager"


def _of_size(rows: Sequence[dict[str, Any]], batch: int, width: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["batch"], row["beam_width"]) == (batch, width)]


def _claim(name: str, measured: float, holds: bool) -> dict[str, Any]:
    return {"case": f"claim: {name}", "measured": measured, "holds": holds}


def main(argv: Sequence[str]) -> int:
    """Verify, measure, judge, write."""
    arguments_of = parser(__doc__)
    add_lengths_argument(arguments_of)
    arguments_of.add_argument("--batch-size", type=int, help="default: 64; on a GPU 256; quick: 16")
    arguments_of.add_argument("--widths", type=int, nargs="+", help="default: 1 5 10 20 50 100; quick: 5 20")
    arguments_of.add_argument("--catalogues", type=int, nargs="*", help="default: 10,000 to 10 million; quick: 10,000")
    arguments_of.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: fp32; on a GPU both")
    arguments_of.add_argument("--rungs", nargs="+", choices=list(RUNGS), help="default: all; quick: without eager")
    arguments = arguments_of.parse_args(argv)
    device, quick = begin(arguments), arguments.quick
    batch_size = arguments.batch_size or (16 if quick else TIMES_HF_BATCH if device == "cpu" else 256)
    widths = arguments.widths or ([5, MAIN_WIDTH] if quick else [1, 5, 10, MAIN_WIDTH, 50, 100])
    catalogues = [10_000] if quick else [10_000, 100_000, 1_000_000, 10_000_000]
    lengths, source = read_lengths(arguments.lengths)
    case = f"{source}, {arguments.threads} threads" if device == "cpu" else f"{source}, GPU"
    named = arguments.rungs or [name for name in RUNGS if not (quick and name.endswith("_eager"))]
    names, rounds = list(dict.fromkeys([OURS, *named])), 3 if quick else 20
    model = build_model(device)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes or (["fp32"] if device == "cpu" else ["fp32", "bf16"]):
        build = partial(build_setting, model, lengths, dtype=dtype)
        batch, single = (build(num_items=NUM_ITEMS, batch_size=size) for size in (batch_size, 1))
        rows += run_beauty(case, batch, single, widths=widths, names=names, rounds=rounds)
        for num_items in catalogues if arguments.catalogues is None else arguments.catalogues:
            setting = build(num_items=num_items, batch_size=batch_size)
            rungs, facts = build_rungs(setting, [name for name in names if name in BY_CATALOGUE])
            rows += run_case(case, setting, rungs, facts, MAIN_WIDTH, rounds=rounds)
    claims = verdict(rows, device)
    finish("beam_search", [*rows, *claims], arguments, device)
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
