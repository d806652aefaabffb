"""A report on a tokenizer that a person wants to read: one HTML page, and its numbers as JSON.

The page needs no network and no other file. Verdict first, then what to change, then the evidence: use of the
codebooks, collisions by name, what the codes keep of the features, whether ids mean something, a tree of prefixes to
browse, and the curves of the run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.files import cannot_write, replace_file
from modules.feature_rows import FeatureMatrix
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.markup import Markup, element, join, json_script
from reports.page import render_page
from reports.tokenizer import examples, sections
from reports.tokenizer.measures import MAX_FEATURE_ROWS, Measures, measure
from reports.tokenizer.neighbours import Neighbour, SampleItem, sample_items
from reports.tokenizer.parts import short_title
from reports.tokenizer.verdict import Verdict, judge

PAGE, METRICS = "index.html", "metrics.json"

MAX_TREE_ITEMS = 20_000
"""Items in the tree of prefixes, which the page carries; of larger catalogues a sample."""

_ROOM = Path(__file__).parent


def write_tokenizer_report(
    folder: Path,
    tokenizer: SemanticIdTokenizer,
    features: FeatureMatrix | None,
    *,
    metrics_log: Path | None = None,
    title: str = "Semantic-id tokenizer",
    categories: Sequence[str] | None = None,
    max_feature_rows: int = MAX_FEATURE_ROWS,
    max_tree_items: int = MAX_TREE_ITEMS,
    seed: int = 0,
) -> Path:
    """Write `index.html` and, with every number of it, `metrics.json`.

    Args:
        folder: made when missing; earlier reports in it are replaced.
        tokenizer: of N items.
        features: [N, input_dim] that its ids were made from; without them the page says what is not available.
        metrics_log: metrics.jsonl of the run, for its curves, which stay in that file.
        title: of the page.
        categories: of the N items, for prefix purity; None takes the catalogue's full paths.
        max_feature_rows: items whose features are read; of more a random sample, and the page says so.
        max_tree_items: the same for the tree of prefixes.
        seed: of samples.

    Returns:
        Path of the page.

    Raises:
        InputError: if features or categories are not one per item, features are not finite, the log is missing,
            or the folder cannot be written.
    """
    measures = measure(tokenizer, features, categories=categories, max_feature_rows=max_feature_rows, seed=seed)
    verdict = judge(measures)
    samples = [] if measures.features is None else sample_items(tokenizer, measures.features, seed=seed)
    shown = _tree_items(tokenizer.num_items, max_tree_items, seed)
    page = _page(tokenizer, measures, verdict, samples, shown, metrics_log, title=title)
    numbers = {
        "verdict": _verdict_json(verdict),
        **measures.as_json(tokenizer),
        "sample_items": [_sample_json(sample, tokenizer.catalogue.item_keys) for sample in samples],
    }
    content = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / METRICS, content)
        replace_file(folder / PAGE, page)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder / PAGE


def _page(
    tokenizer: SemanticIdTokenizer,
    measures: Measures,
    verdict: Verdict,
    samples: Sequence[SampleItem],
    shown: list[int],
    metrics_log: Path | None,
    *,
    title: str,
) -> str:
    parts = {
        "Verdict": sections.verdict_section(verdict, measures),
        "Levels": sections.levels_section(measures),
        "Collisions": examples.collisions_section(measures, tokenizer),
        "Reconstruction": sections.reconstruction_section(measures, tokenizer),
        "Meaning": examples.meaning_section(measures, tokenizer, samples),
        **({} if metrics_log is None else {"Training": sections.training_section(metrics_log)}),
        "Prefixes": sections.tree_section(tokenizer.num_items, len(shown)),
        "Facts": sections.facts_section(tokenizer),
    }
    script = Markup((_ROOM / "script.js").read_text(encoding="utf-8"))
    return render_page(
        parts,
        title=title,
        subtitle=_subtitle(measures),
        footer="The numbers of this page are in metrics.json beside it, those of training curves in the run's "
        "metrics.jsonl.",
        style=(_ROOM / "style.css").read_text(encoding="utf-8"),
        scripts=join(json_script("data", _tree_data(tokenizer, shown)), element("script", script)),
    )


def _subtitle(measures: Measures) -> str:
    sizes = measures.codebook_sizes
    shape = f"{len(sizes)} x {sizes[0]:,}" if len(set(sizes)) == 1 else " x ".join(f"{size:,}" for size in sizes)
    removed = f", {measures.num_removed:,} of them removed" if measures.num_removed else ""
    items = f"{measures.num_items:,} item{'' if measures.num_items == 1 else 's'}"
    return f"{items}{removed} · codebooks {shape} · language {measures.language}"


def _tree_items(num_items: int, most: int, seed: int) -> list[int]:
    if num_items <= most:
        return list(range(num_items))
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))[:most].sort().values.tolist()


def _tree_data(tokenizer: SemanticIdTokenizer, items: list[int]) -> dict[str, Any]:
    """Columns of the items that the page's script shows."""
    catalogue = tokenizer.catalogue
    categories = list(dict.fromkeys(catalogue.categories[item] for item in items))
    numbers = {category: number for number, category in enumerate(categories)}
    return {
        "levels": tokenizer.num_codebooks,
        "width": tokenizer.semantic_ids.shape[1],
        "codes": tokenizer.semantic_ids[items].flatten().tolist(),
        "keys": [catalogue.item_keys[item] for item in items],
        "titles": [short_title(catalogue.titles[item]) for item in items],
        "categories": categories,
        "category": [numbers[catalogue.categories[item]] for item in items],
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    checks = [
        {**asdict(check), "status": check.status.value, "advice": check.advice if check in verdict.to_change else ""}
        for check in verdict.checks
    ]
    return {"status": verdict.status.value, "headline": verdict.headline, "summary": verdict.summary, "checks": checks}


def _sample_json(sample: SampleItem, keys: Sequence[str]) -> dict[str, Any]:
    def near(found: Sequence[Neighbour]) -> list[dict[str, Any]]:
        return [
            {"item_key": keys[one.item_id], "num_shared": one.num_shared, "cosine": round(one.cosine, 6)}
            for one in found
        ]

    return {
        "item_key": keys[sample.item_id],
        "by_features": near(sample.by_features),
        "by_ids": near(sample.by_ids),
    }
