"""What is checked of a tokenizer, against which threshold, and what to change where it fails.

The thresholds are rules of thumb, stated on the page beside what was measured. They were set on catalogues of ten
thousand items with text features and codebooks of 256; between two tokenizers of one catalogue the numbers themselves
decide.
"""

import enum
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from modules.tokenizer.policies import CollisionPolicy
from reports.parts import count, percent
from reports.tokenizer.measures import Measures


class Status(enum.Enum):
    """Of a check, and of the worst of all checks."""

    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to the numbers.

    Attributes:
        name: what is asked about.
        measured: the answer in words.
        expected: the threshold in words.
        status: UNKNOWN where it could not be asked.
        advice: what to change where it did not pass.
    """

    name: str
    measured: str
    expected: str
    status: Status
    advice: str = ""


@dataclass(frozen=True)
class Threshold:
    """From `good` on all is well, below `bad` it is not; between lies a warning. Larger is better."""

    good: float
    bad: float

    def status(self, value: float) -> Status:
        """Where a value lies."""
        return Status.GOOD if value >= self.good else Status.BAD if value < self.bad else Status.WARN

    def words(self, what: str) -> str:
        """As the page states it."""
        return f"{what} at least {self.good:.0%}; below {self.bad:.0%} is bad"


USE = Threshold(0.95, 0.5)
EVENNESS = Threshold(0.9, 0.5)
UNIQUE = Threshold(0.97, 0.8)
KEPT = Threshold(0.95, 0.8)
DISTINCT_FEATURES = Threshold(0.95, 0.5)
EXPLAINED = Threshold(0.3, 0.1)
LEVEL_GAIN = Threshold(0.05, 0.01)
PURITY = Threshold(0.15, 0.03)
NEIGHBOURS = Threshold(0.3, 0.1)
REPRODUCED = Threshold(0.99, 0.5)
GROUP_SHARE, GROUP_SIZES = 0.001, (8, 50)
"""A group of colliding items is large when it exceeds this share of the items, held between these sizes."""
FULL_DEDUP = 0.75


def _features_differ(measures: Measures) -> Check:
    name, expected = "Features", DISTINCT_FEATURES.words("different rows per item")
    if measures.features is None:
        return _unknown(name, expected, "no features given")
    num_rows, num_distinct = len(measures.features.rows), measures.features.num_distinct
    share = num_distinct / num_rows
    return Check(
        name=name,
        measured=f"{num_distinct:,} different rows of {num_rows:,} ({percent(share)})",
        expected=expected,
        status=DISTINCT_FEATURES.status(share),
        advice="Items with identical features cannot be told apart by any quantizer. Look at the largest collision "
        "groups: empty texts, one boilerplate description, or the same product listed many times. Add fields to the "
        "feature template or merge the duplicates.",
    )


def _features_are_those(measures: Measures) -> Check:
    name, expected = "Ids fit the features", REPRODUCED.words("items whose codes come out again")
    if measures.features is None or measures.features.reproduced is None:
        return _unknown(name, expected, _no_features_or_quantizer(measures))
    return Check(
        name=name,
        measured=percent(measures.features.reproduced),
        expected=expected,
        status=REPRODUCED.status(measures.features.reproduced),
        advice="The features given to this report are not those that the ids were made from: another encoder, "
        "template or order of items. All that this page says of features is about the wrong ones.",
    )


def _usable_codes(measures: Measures) -> list[int]:
    """Codes per level that could have an item: where features are all alike, their number is the measure."""
    most = measures.num_items
    if measures.features is not None and measures.ceiling is not None:
        most = measures.features.num_distinct
    return [min(size, most) for size in measures.codebook_sizes]


def _codes_in_use(measures: Measures) -> Check:
    usable = _usable_codes(measures)
    shares = [used / most for used, most in zip(measures.nearest.num_used, usable, strict=True)]
    level = min(range(len(shares)), key=shares.__getitem__)
    used = measures.nearest.num_used[level]
    return Check(
        name="Codes in use",
        measured=f"{percent(shares[level])} at the worst level ({level}: {used:,} of {usable[level]:,})",
        expected=USE.words("every level"),
        status=USE.status(shares[level]),
        advice=f"Level {level} has {usable[level] - used:,} codes without an item. "
        + _quantizer_advice(
            measures,
            "Set restart_after (50, for instance), so that dead codes move to rows of the batch, or a "
            "sinkhorn_epsilon for that level; train the autoencoder longer before k-means sets the codebooks; lower "
            f"the learning rate. {_smaller(measures, level)}",
        ),
    )


def _codes_are_even(measures: Measures) -> Check:
    name, expected = "Codes evenly used", EVENNESS.words("entropy of every level, of what is possible,")
    possible = [math.log2(usable) for usable in _usable_codes(measures)]
    if not all(possible):
        return _unknown(name, expected, "one code at a level, one item, or one row of features")
    shares = [bits / most for bits, most in zip(measures.nearest.entropy, possible, strict=True)]
    level = min(range(len(shares)), key=shares.__getitem__)
    return Check(
        name=name,
        measured=f"{percent(shares[level])} at the worst level ({level}: {measures.nearest.entropy[level]:.2f} of "
        f"{possible[level]:.2f} bits)",
        expected=expected,
        status=EVENNESS.status(shares[level]),
        advice=f"A few codes of level {level} hold most items, as if it had "
        f"{measures.nearest.perplexity[level]:.0f}. "
        + _quantizer_advice(
            measures, "Balance it with sinkhorn_epsilon (0.003 to 0.05), or use ema_decay with restart_after."
        ),
    )


def _ids_are_unique(measures: Measures) -> Check:
    ceiling = measures.ceiling
    of_what = "distinct tuples per item" if ceiling is None else "distinct tuples, of the distinct features,"
    name, expected = "Unique before the policy", UNIQUE.words(of_what)
    ratio = measures.nearest.unique_ratio
    share = min(ratio / (ceiling or 1.0), 1.0)
    room = math.prod(measures.codebook_sizes)
    return Check(
        name=name,
        measured=f"{percent(ratio)} of the items"
        + ("" if ceiling is None else f"; {percent(ceiling)} is possible with these features"),
        expected=expected,
        status=UNIQUE.status(share),
        advice=f"{measures.num_items:,} items share {room:,} possible tuples badly. "
        + _quantizer_advice(
            measures,
            "Balance the last level (sinkhorn_epsilon for it alone), choose the checkpoint with the fewest collisions, "
            "or add a level or larger codebooks. Where codes lie unused, mend that first.",
        ),
    )


def _groups_are_small(measures: Measures) -> Check:
    name = "Largest collision group"
    low, high = GROUP_SIZES
    limit = min(max(low, math.floor(GROUP_SHARE * measures.num_items)), high)
    expected = (
        f"at most {limit:,} items ({GROUP_SHARE:.1%} of all, but no fewer than {low} and no more than {high}); ten "
        "times that is bad"
    )
    size = measures.nearest.largest_group
    rows = measures.groups[0].num_distinct_features if measures.groups else None
    return Check(
        name=name,
        measured=count(size, "item") + ("" if rows is None else f", {count(rows, 'different row')} of features"),
        expected=expected,
        status=Status.GOOD if size <= limit else Status.BAD if size > 10 * limit else Status.WARN,
        advice="Read its titles under Collisions. Where they are the same product or the same text, mend the features; "
        "where they differ, the codebooks are too coarse in a crowded corner: add a level, or balance the last one.",
    )


def _policy_separates(measures: Measures) -> Check:
    name = "After the policy"
    if measures.policy is CollisionPolicy.NONE:
        colliding = measures.final.num_colliding
        return Check(
            name=name,
            measured=f"{count(colliding, 'item')} share their id",
            expected="every item an id of its own",
            status=Status.WARN if colliding else Status.GOOD,
            advice="The policy is none: a model cannot tell these items apart and ranks them by their order alone. "
            "Choose dedup_code or nearest_free, unless something after it separates them.",
        )
    if measures.policy is CollisionPolicy.NEAREST_FREE:
        return _few_were_moved(measures, name)
    capacity, largest = measures.dedup_capacity or 1, measures.nearest.largest_group
    return Check(
        name=name,
        measured=f"{measures.final.num_distinct:,} ids for {count(measures.num_items, 'item')}; dedup level filled "
        f"{largest:,} of {capacity:,}",
        expected=f"every item an id of its own, and at most {FULL_DEDUP:.0%} of the dedup level filled",
        status=Status.BAD
        if measures.final.num_distinct < measures.num_items
        else Status.WARN
        if largest > FULL_DEDUP * capacity
        else Status.GOOD,
        advice="Items that join the fullest tuple will soon find no dedup code. Fit again with a larger dedup_size, or "
        "use nearest_free.",
    )


def _few_were_moved(measures: Measures, name: str) -> Check:
    expected = KEPT.words("items that keep their nearest codes:")
    kept = 1 - measures.num_moved / measures.num_items
    separate = measures.final.num_distinct == measures.num_items
    return Check(
        name=name,
        measured=f"{measures.final.num_distinct:,} ids for {count(measures.num_items, 'item')}; "
        f"{measures.num_moved:,} moved",
        expected=f"every item an id of its own; {expected}",
        status=KEPT.status(kept) if separate else Status.BAD,
        advice="Moved items carry codes that are not their nearest, so their ids say less. Mend what makes them "
        "collide (see above) before the policy hides it.",
    )


def _features_are_kept(measures: Measures) -> Check:
    name, expected = "Reconstruction", EXPLAINED.words("variance of the features kept:")
    found = None if measures.features is None else measures.features.reconstruction
    if found is None:
        return _unknown(name, expected, _no_features_or_quantizer(measures))
    if found.explained is None or found.explained_unquantized is None:
        return _unknown(name, expected, "the features do not vary")
    lost = found.explained_unquantized - found.explained
    if found.explained_unquantized < 2 * EXPLAINED.good and lost < found.explained_unquantized / 2:
        cause = "Most is lost in the autoencoder: widen embed_dim or hidden_dims, or train longer."
    else:
        cause = "Most is lost in the codes: add a level or larger codebooks, or lower the commitment weight."
    return Check(
        name=name,
        measured=f"{_kept(found.explained)}; the autoencoder alone: {_kept(found.explained_unquantized)}",
        expected=expected,
        status=EXPLAINED.status(found.explained),
        advice=f"The codes keep little of what the features say. {cause}",
    )


def _levels_add(measures: Measures) -> Check:
    name, expected = "Every level adds", LEVEL_GAIN.words("of what the levels before it leave, it takes")
    found = None if measures.features is None else measures.features.reconstruction
    if found is None:
        return _unknown(name, expected, _no_features_or_quantizer(measures))
    left = (found.latent_variance, *found.latent_residual)
    if min(left[:-1]) <= 0:
        return _unknown(name, expected, "nothing is left to take")
    # The first level also places the mean, and a normalised latent's codes need not lie in its span.
    gains = [1 - after / before for before, after in itertools.pairwise(left)]
    level = min(range(len(gains)), key=gains.__getitem__)
    return Check(
        name=name,
        measured=f"level {level} takes least: {percent(gains[level])}"
        if gains[level] >= 0
        else f"level {level} adds error instead of taking some away",
        expected=expected,
        status=LEVEL_GAIN.status(gains[level]),
        advice=f"Level {level} makes ids longer and says next to nothing. Remove it, or let it learn: initialise it by "
        "k-means on the residuals, raise its codebook's learning rate, or use ema_decay.",
    )


def _prefixes_are_pure(measures: Measures) -> Check:
    name, expected = "Prefixes and categories", PURITY.words("purity of the first code, from chance (0%) to pure,")
    if not measures.purity:
        return _unknown(name, expected, "no categories")
    first = measures.purity[0]
    if first.share is None or first.chance is None or first.chance == 1:
        return _unknown(name, expected, "one category, or no items that share a code")
    above = (first.share - first.chance) / (1 - first.chance)
    return Check(
        name=name,
        measured=f"{percent(above)}: purity {percent(first.share)}, by chance {percent(first.chance)}",
        expected=expected,
        status=PURITY.status(above),
        advice="Items on one first code are hardly more alike than any two items: ids tell items apart without saying "
        "what they are. Check the features first (do neighbours make sense?), then lower sinkhorn_epsilon, which "
        "trades meaning for balance.",
    )


def _neighbours_agree(measures: Measures) -> Check:
    name, expected = "Neighbours in features and ids", NEIGHBOURS.words("nearest items that share the first code:")
    agreement = None if measures.features is None else measures.features.agreement
    if agreement is None:
        reason = "no features given" if measures.features is None else "one item"
        return _unknown(name, expected, reason)
    if measures.features is not None and measures.features.num_distinct == 1:
        return _unknown(name, expected, "all features are the same")
    return Check(
        name=name,
        measured=f"{percent(agreement.by_depth[0])}; by chance {percent(agreement.chance_by_depth[0])}",
        expected=expected,
        status=NEIGHBOURS.status(agreement.by_depth[0])
        if agreement.by_depth[0] > 2 * agreement.chance_by_depth[0]
        else Status.BAD,
        advice="Items that are near by their features are far apart in ids (or all items share one code), so a model "
        "learns little from one item about the next. Train longer or with a smaller first codebook; check that these "
        "are the features of the ids.",
    )


CHECKS: tuple[Callable[[Measures], Check], ...] = (
    _features_differ,
    _features_are_those,
    _codes_in_use,
    _codes_are_even,
    _ids_are_unique,
    _groups_are_small,
    _policy_separates,
    _features_are_kept,
    _levels_add,
    _prefixes_are_pure,
    _neighbours_agree,
)
"""All of them, causes before what follows from them."""


def _unknown(name: str, expected: str, reason: str) -> Check:
    return Check(name=name, measured=f"not available: {reason}", expected=expected, status=Status.UNKNOWN)


def _no_features_or_quantizer(measures: Measures) -> str:
    return "no features given" if measures.features is None else "the ids have no quantizer"


def _quantizer_advice(measures: Measures, advice: str) -> str:
    return advice if measures.has_quantizer else "These ids were imported: whoever made them has to train again."


def _smaller(measures: Measures, level: int) -> str:
    """The power of two that would hold as much, where it is smaller than the codebook."""
    needed = 1 << math.ceil(measures.nearest.entropy[level])
    if needed >= measures.codebook_sizes[level]:
        return ""
    return f"Or make it smaller: {count(needed, 'code')} would hold what it says."


def _kept(explained: float) -> str:
    return f"{percent(explained)} kept" if explained >= 0 else f"an error {1 - explained:.1f} times the variance"
