"""The sections of a tokenizer's report that name items: who collides, and who is near whom."""

from collections.abc import Sequence

from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.markup import Markup, element, join
from reports.parts import NOTHING, count, gauge, percent, table
from reports.tokenizer.measures import Group, Measures
from reports.tokenizer.neighbours import Neighbour, SampleItem
from reports.tokenizer.parts import code_boxes, first_codes, item_entry, sampled, short_title

_GROUP_ITEMS = 10
_FIRST_GROUPS = 8
_POLICY_WORDS = {
    CollisionPolicy.DEDUP_CODE: "dedup_code: one more code counts the items on a tuple",
    CollisionPolicy.NEAREST_FREE: "nearest_free: all but one item on a tuple move to free codes close by",
    CollisionPolicy.NONE: "none: items may share their id",
}


def collisions_section(measures: Measures, tokenizer: SemanticIdTokenizer) -> Markup:
    """What collides, before and after the policy, by name."""
    columns = [
        (
            f"{health.num_distinct:,} ({percent(health.unique_ratio)})",
            f"{health.num_colliding:,}",
            f"{health.largest_group:,}",
        )
        for health in (measures.nearest, measures.final)
    ]
    names = ("distinct ids, of the items", "items that share theirs", "largest group")
    notes = [f"Policy {_POLICY_WORDS[measures.policy]}."]
    if measures.policy is CollisionPolicy.NEAREST_FREE:
        notes.append(f"{count(measures.num_moved, 'item')} moved ({percent(measures.num_moved / measures.num_items)}).")
    if measures.ceiling is not None and measures.ceiling < 1:
        notes.append(
            f"With these features at most {percent(measures.ceiling)} can be distinct before the policy: the rest have "
            "the same features as another item."
        )
    shown = f"The {len(measures.groups):,} largest of" if measures.num_groups > len(measures.groups) else "All"
    groups = [_group(group, tokenizer, is_open=index == 0) for index, group in enumerate(measures.groups)]
    listed = (
        join(
            element("h3", "Who collides"),
            element("p", f"{shown} {count(measures.num_groups, 'group')} of items on one tuple.", class_="soft"),
            *groups[:_FIRST_GROUPS],
            _folded(groups[_FIRST_GROUPS:]),
        )
        if measures.groups
        else element("p", "No two items share their codes.")
    )
    return element(
        "section",
        element("h2", "Collisions"),
        element("p", " ".join(notes)),
        table(
            ("", "before the policy", "after it"),
            list(zip(names, *columns, strict=True)),
            numbers=(1, 2),
            narrow=True,
        ),
        listed,
        id="collisions",
    )


def meaning_section(measures: Measures, tokenizer: SemanticIdTokenizer, samples: Sequence[SampleItem]) -> Markup:
    """Whether ids say what items are."""
    return element(
        "section",
        element("h2", "Meaning"),
        element("h3", "Prefix purity"),
        _purity(measures),
        element("h3", "Nearest by features, nearest by ids"),
        _agreement(measures),
        *(_sample(sample, tokenizer, is_open=index == 0) for index, sample in enumerate(samples)),
        id="meaning",
    )


def _purity(measures: Measures) -> Markup:
    if not measures.purity:
        return element("p", "Not available: the catalogue has no categories.")
    rows = [
        (
            first_codes(purity.depth),
            "none share" if purity.share is None else percent(purity.share),
            gauge(purity.share or 0.0, mark=purity.chance),
            NOTHING if purity.chance is None else percent(purity.chance),
            f"{purity.num_items:,}",
        )
        for purity in measures.purity
    ]
    return join(
        element(
            "p",
            "For an item that shares its prefix with others: the share of them in its category, of "
            f"{count(measures.num_categories, 'different one')}. The mark is chance. Longer prefixes are compared "
            "over fewer items, so compare tokenizers at the first code.",
            class_="soft",
        ),
        table(("items sharing", "purity", "", "by chance", "items"), rows, numbers=(1, 3, 4), bar=2),
    )


def _folded(groups: Sequence[Markup]) -> Markup:
    if not groups:
        return Markup("")
    summary = element("summary", f"Show {count(len(groups), 'smaller group')}", class_="soft")
    return element("details", summary, element("div", *groups, class_="inside"))


def _group(group: Group, tokenizer: SemanticIdTokenizer, *, is_open: bool) -> Markup:
    features = (
        ""
        if group.num_distinct_features is None
        else "all with the same features"
        if group.num_distinct_features == 1
        else f"{group.num_distinct_features:,} different rows of features"
    )
    first = short_title(tokenizer.catalogue.display_name(group.item_ids[0]))
    row = element(
        "span",
        code_boxes(group.codes, len(group.codes)),
        element("span", f"{len(group.item_ids):,} items", class_="soft"),
        element("span", first, class_="label title"),
        class_="row",
    )
    hidden = len(group.item_ids) - _GROUP_ITEMS
    more = element("p", f"and {hidden:,} more", class_="soft") if hidden > 0 else Markup("")
    return element(
        "details",
        element("summary", row),
        element(
            "div",
            element("p", features, class_="soft") if features else Markup(""),
            element("ul", *(item_entry(tokenizer, item) for item in group.item_ids[:_GROUP_ITEMS]), class_="items"),
            more,
            class_="inside",
        ),
        open="" if is_open else None,
    )


def _agreement(measures: Measures) -> Markup:
    if measures.features is None:
        return element("p", "Not available: no features given.")
    agreement = measures.features.agreement
    if agreement is None:
        return element("p", "Not available: one item has no neighbours.")
    rows = [
        (first_codes(depth + 1), percent(share), gauge(share, mark=chance), f"{chance:.2%}")
        for depth, (share, chance) in enumerate(zip(agreement.by_depth, agreement.chance_by_depth, strict=True))
    ]
    k = agreement.num_neighbours
    return join(
        element(
            "p",
            f"Of the {k} nearest items by features (cosine), over {count(agreement.num_sampled, 'sampled item')}, how "
            f"many share the first codes. Of the {k} nearest by ids, {percent(agreement.overlap)} are among them "
            f"({agreement.overlap_chance:.2%} by chance). Below, filled boxes are first codes that are shared, and a "
            "line at the side marks items in both lists.",
            class_="soft",
        ),
        sampled(measures, measures.features),
        table(("neighbours sharing", "share", "", "by chance"), rows, numbers=(1, 3), bar=2),
    )


def _sample(sample: SampleItem, tokenizer: SemanticIdTokenizer, *, is_open: bool) -> Markup:
    both = {near.item_id for near in sample.by_features} & {near.item_id for near in sample.by_ids}
    title = short_title(tokenizer.catalogue.display_name(sample.item_id))
    row = element(
        "span",
        code_boxes(tokenizer.codes[sample.item_id].tolist(), tokenizer.num_codebooks),
        element("span", title, class_="label title"),
        element("span", f"{len(both)} of {len(sample.by_features)} in both", class_="soft"),
        class_="row",
    )
    columns = [
        element(
            "div",
            element("h4", heading),
            element("ol", *(_near(tokenizer, near, near.item_id in both) for near in found), class_="items"),
        )
        for heading, found in (("Nearest by features", sample.by_features), ("Nearest by ids", sample.by_ids))
    ]
    return element(
        "details",
        element("summary", row),
        element("div", *columns, class_="pair inside"),
        open="" if is_open else None,
    )


def _near(tokenizer: SemanticIdTokenizer, near: Neighbour, in_both: bool) -> Markup:
    return item_entry(
        tokenizer,
        near.item_id,
        f"cosine {near.cosine:.2f}",
        num_shared=near.num_shared,
        class_="both" if in_both else None,
    )
