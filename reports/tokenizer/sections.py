"""The sections of a tokenizer's report that show numbers: numbers in, markup out."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from evaluation.reconstruction import Reconstruction
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.charts import Line, line_chart
from reports.markup import Markup, element, join
from reports.parts import NOTHING, gauge, key_figures, percent, table
from reports.plots import panels, read_curves
from reports.tokenizer.checks import Check, Status
from reports.tokenizer.measures import FeatureMeasures, Histogram, Measures
from reports.tokenizer.parts import first_codes, item_entry, sampled
from reports.tokenizer.verdict import Verdict

_STATUS_WORDS = {Status.GOOD: "ok", Status.WARN: "could be better", Status.BAD: "bad", Status.UNKNOWN: "not checked"}
_FIRST_CURVES = (
    *("loss", "reconstruction", "quantize", "unique_ratio", "collision_rate", "largest_group", "use", "entropy"),
)
_LEFT_OUT_CURVES = ("perplexity",)
"""Says what entropy says."""


def verdict_section(verdict: Verdict, measures: Measures) -> Markup:
    """What a person has to know first, and what to do."""
    changes = [
        element(
            "li",
            _mark(check.status),
            element("span", f"{check.name}: ", class_="name"),
            element("span", check.measured),
            element("p", check.advice),
        )
        for check in verdict.to_change
    ]
    change = join(element("h3", "What to change"), element("ol", *changes, class_="change")) if changes else Markup("")
    return element(
        "section",
        element("h2", verdict.headline),
        element("p", verdict.summary, class_="summary"),
        _key_figures(measures),
        change,
        element("h3", "What was checked"),
        _check_table(verdict.checks),
        element(
            "p",
            "The thresholds are rules of thumb for catalogues of about ten thousand items and codebooks of 256. "
            "Between two tokenizers of one catalogue the numbers themselves decide.",
            class_="soft",
        ),
        id="verdict",
        class_=verdict.status.value,
    )


def levels_section(measures: Measures) -> Markup:
    """Use and entropy per level, and how often each code is used."""
    health = measures.nearest
    rows = []
    for level, size in enumerate(health.codebook_sizes):
        use, bits = health.use[level], health.entropy[level]
        rows.append(
            (
                element("strong", f"level {level}", class_=f"l{level % 8}"),
                f"{health.num_used[level]:,} of {size:,}",
                gauge(use),
                percent(use),
                f"{bits:.2f} of {math.log2(size):.2f}",
                f"{health.perplexity[level]:,.0f}",
                f"{measures.code_counts[level][0]:,}",
            )
        )
    head = ("", "codes in use", "", "use", "entropy, bits", "perplexity", "most items on a code")
    lines = [_staircase(level, counts) for level, counts in enumerate(measures.code_counts)]
    sizes = set(measures.codebook_sizes)
    even = ("all codes alike", measures.num_items / sizes.pop()) if len(sizes) == 1 else None
    chart = line_chart(
        "Items per code, most used first",
        lines,
        x_label="% of the level's codes",
        x_span=(0, 100),
        log_y=True,
        level=even,
    )
    return element(
        "section",
        element("h2", "Levels"),
        element("p", "Of the nearest codes, before the collision policy.", class_="soft"),
        table(head, rows, numbers=(1, 3, 4, 5, 6), bar=2),
        element("div", chart, class_="wide"),
        element(
            "p",
            "A line that ends before the right edge has dead codes there; the flatter, the more evenly codes are used. "
            "Perplexity is the number of equally frequent codes that would be as varied (2 to the entropy).",
            class_="soft",
        ),
        id="levels",
    )


def reconstruction_section(measures: Measures, tokenizer: SemanticIdTokenizer) -> Markup:
    """What the codes keep of the features."""
    heading = element("h2", "Reconstruction")
    features = measures.features
    if features is None or features.reconstruction is None or features.error_histogram is None:
        reason = "no features given" if features is None else "the ids were imported and have no quantizer"
        return element("section", heading, element("p", f"Not available: {reason}."), id="reconstruction")
    found = features.reconstruction
    return element(
        "section",
        heading,
        sampled(measures, features),
        element("p", _error_words(found, features)),
        _latent_table(found),
        element("h3", "Error of each item"),
        _histogram(features.error_histogram),
        element("h3", "Worst reconstructed"),
        element("p", "Often items without text, or of a kind that the catalogue has few of.", class_="soft"),
        element(
            "ul",
            *(item_entry(tokenizer, item, f"error {error:.3g}") for item, error in features.worst),
            class_="items",
        ),
        id="reconstruction",
    )


def tree_section(num_items: int, num_shown: int) -> Markup:
    """The place that the page's script fills."""
    note = (
        f"A random {num_shown:,} of {num_items:,} items; counts are of these."
        if num_shown < num_items
        else "Open a code to see what lies behind it; the words are its most frequent category."
    )
    return element(
        "section",
        element("h2", "Prefixes"),
        element("p", note, class_="soft"),
        element("label", "Find an item by title or key", for_="search"),
        Markup('<input id="search" type="search" autocomplete="off" spellcheck="false">'),
        element("p", id="hits", class_="soft", role="status"),
        element("ul", id="found", class_="items", aria_label="Items found"),
        element("div", id="tree"),
        element("noscript", element("p", "This part needs JavaScript.")),
        id="prefixes",
    )


def training_section(metrics_log: Path) -> Markup:
    """Curves of the run."""
    charts = []
    found = panels(read_curves(metrics_log))
    known = [quantity for quantity in _FIRST_CURVES if quantity in found]
    others = [quantity for quantity in found if quantity not in (*_FIRST_CURVES, *_LEFT_OUT_CURVES)]
    for quantity in (*known, *others):
        curves = found[quantity]
        lines = [
            Line(_curve_name(name, quantity), steps, values, f"l{index % 8}")
            for index, (name, (steps, values)) in enumerate(curves.items())
        ]
        charts.append(line_chart(quantity.replace("_", " "), lines, x_label="step"))
    content = element("div", *charts, class_="charts") if charts else element("p", "The log holds no curves yet.")
    return element("section", element("h2", "Training"), content, id="training")


def facts_section(tokenizer: SemanticIdTokenizer) -> Markup:
    """Configuration and origin."""
    rqvae = tokenizer.rqvae
    config = "imported, without quantizer" if rqvae is None else json.dumps(rqvae.config.to_dict(), indent=2)
    origin = {name: value for name, value in tokenizer.manifest.items() if name != "metrics"}
    return element(
        "section",
        element("h2", "Facts"),
        element("details", element("summary", "Quantizer"), element("pre", config)),
        element(
            "details",
            element("summary", "Origin of features, data and codes"),
            element("pre", json.dumps(origin, indent=2, ensure_ascii=False, default=str)),
        ),
        id="facts",
    )


def _key_figures(measures: Measures) -> Markup:
    health = measures.nearest
    figures = [
        ("codes in use, worst level", percent(min(health.use)), f"{len(health.use)} levels"),
        ("unique before the policy", percent(health.unique_ratio), _ceiling_words(measures)),
        (
            "unique after it",
            percent(measures.final.unique_ratio),
            measures.policy.value,
        ),
    ]
    found = None if measures.features is None else measures.features.reconstruction
    if found is not None and found.explained is not None:
        figures.append(("features kept", percent(found.explained), "share of their variance"))
    if measures.purity and measures.purity[0].share is not None:
        chance = measures.purity[0].chance or 0.0
        figures.append(("purity of the first code", percent(measures.purity[0].share), f"{percent(chance)} by chance"))
    agreement = None if measures.features is None else measures.features.agreement
    if agreement is not None:
        figures.append(
            ("neighbours on one first code", percent(agreement.by_depth[0]), f"of {agreement.num_neighbours} nearest")
        )
    return key_figures(figures)


def _ceiling_words(measures: Measures) -> str:
    return "of the items" if measures.ceiling is None else f"{percent(measures.ceiling)} is possible"


def _check_table(checks: Iterable[Check]) -> Markup:
    rows = [
        (
            element("strong", check.name),
            _mark(check.status),
            check.measured,
            element("span", check.expected, class_="soft"),
        )
        for check in checks
    ]
    return table(("check", "", "measured", "threshold"), rows)


def _staircase(level: int, counts: Sequence[int]) -> Line:
    """Every code as a step, from 0 to 100% of the codebook."""
    xs = [100 * place / len(counts) for code in range(len(counts)) for place in (code, code + 1)]
    return Line(f"level {level}", xs, [count for count in counts for _ in range(2)], f"l{level % 8}")


def _mark(status: Status) -> Markup:
    return element("span", _STATUS_WORDS[status], class_=f"mark {status.value}")


def _error_words(found: Reconstruction, features: FeatureMeasures) -> str:
    words = (
        f"Mean squared error per item {found.error:.4g}; the autoencoder alone, without codes, "
        f"{found.unquantized:.4g}; features scatter around their mean by {found.variance:.4g}."
    )
    if found.explained is not None and found.explained_unquantized is not None:
        words += (
            f" So the codes keep {percent(found.explained)} of the features' variance, and the autoencoder would keep "
            f"{percent(found.explained_unquantized)}."
        )
    if features.nearest_error is not None:
        words += f" Before items were moved, the error was {features.nearest_error:.4g}."
    return words


def _latent_table(found: Reconstruction) -> Markup:
    rows = [
        (
            first_codes(level + 1),
            f"{left:.4g}",
            gauge(max(explained or 0.0, 0.0)),
            NOTHING if explained is None else percent(explained),
        )
        for level, (left, explained) in enumerate(zip(found.latent_residual, found.latent_explained, strict=True))
    ]
    return table(("with", "squared residual of the latent", "", "of its variance kept"), rows, numbers=(1, 3), bar=2)


def _histogram(found: Histogram) -> Markup:
    most = max(found.counts)
    bars = [element("div", style=f"height:{100 * count / most:.1f}%") for count in found.counts]
    low, median, high = (f"{value:.3g}" for value in (found.low, found.median, found.high))
    if found.high <= found.low:
        return element("p", f"All errors are {low}.")
    spoken = f"histogram of errors from {low} to {high}, median {median}"
    return join(
        element("div", *bars, class_="histogram", role="img", aria_label=spoken),
        element(
            "div",
            element("span", low),
            element("span", f"median {median}"),
            element("span", f"{high} and more"),
            class_="ends soft",
        ),
    )


def _curve_name(name: str, quantity: str) -> str:
    """What tells a curve from the others of its panel."""
    return name.removesuffix(f"/{quantity}").replace("_", " ").removeprefix(f"codebook/{quantity.replace('_', ' ')} ")
