"""Small parts of a tokenizer's report: words, and items with their codes."""

from collections.abc import Sequence

from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.markup import Markup, element
from reports.tokenizer.measures import FeatureMeasures, Measures

MAX_TITLE = 160


def short_title(text: str) -> str:
    """At most so many characters."""
    return text if len(text) <= MAX_TITLE else f"{text[: MAX_TITLE - 1]}…"


def first_codes(depth: int) -> str:
    """A prefix in words."""
    return "the first code" if depth == 1 else f"the first {depth} codes"


def item_entry(
    tokenizer: SemanticIdTokenizer, item_id: int, *notes: str, num_shared: int = 0, class_: str | None = None
) -> Markup:
    """An item of a list: its title, semantic id, key and category.

    Args:
        tokenizer: of the item.
        item_id: which.
        notes: further facts.
        num_shared: first codes to be marked.
        class_: of the entry.
    """
    catalogue = tokenizer.catalogue
    facts = [code_boxes(tokenizer.semantic_ids[item_id].tolist(), tokenizer.num_codebooks, num_shared)]
    if catalogue.titles[item_id]:
        facts.append(element("span", catalogue.item_keys[item_id]))
    if catalogue.categories[item_id]:
        facts.append(element("span", catalogue.categories[item_id]))
    facts += [element("span", note) for note in notes]
    return element(
        "li",
        element("div", short_title(catalogue.display_name(item_id)), class_="title"),
        element("div", *facts, class_="facts"),
        class_=class_,
    )


def code_boxes(codes: Sequence[int], num_codebooks: int, num_shared: int = 0) -> Markup:
    """A prefix or semantic id as boxes, dedup codes behind num_codebooks; the first num_shared are marked."""
    boxes = [
        element(
            "span",
            str(code),
            class_=("dedup" if level >= num_codebooks else f"l{level % 8}") + (" shared" if level < num_shared else ""),
        )
        for level, code in enumerate(codes)
    ]
    spoken = f"codes {', '.join(map(str, codes))}"
    return element("span", *boxes, class_="codes", role="img", aria_label=spoken)


def sampled(measures: Measures, features: FeatureMeasures) -> Markup:
    """Says so where the features of a sample were read."""
    if len(features.rows) == measures.num_items:
        return Markup("")
    return element("p", f"Of a random {len(features.rows):,} of {measures.num_items:,} items.", class_="soft")
