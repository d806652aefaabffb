"""A plain verdict on a tokenizer: healthy, or what to change."""

from dataclasses import dataclass

from reports.parts import count
from reports.tokenizer.checks import CHECKS, Check, Status
from reports.tokenizer.measures import Measures

MIN_ITEMS = 32
"""Below, shares and entropies say too little for a verdict."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The worst of the checks, in words.

    Attributes:
        status: UNKNOWN for catalogues too small to judge.
        headline: a few words.
        summary: a sentence or two.
        checks: all of them.
    """

    status: Status
    headline: str
    summary: str
    checks: tuple[Check, ...]

    @property
    def to_change(self) -> list[Check]:
        """What did not pass, worst first; nothing where the catalogue is too small to judge."""
        if self.status is Status.UNKNOWN:
            return []
        return [check for status in (Status.BAD, Status.WARN) for check in self.checks if check.status is status]


def judge(measures: Measures) -> Verdict:
    """Check a tokenizer's numbers; what needs features or categories that are not there stays unknown."""
    checks = tuple(check(measures) for check in CHECKS)
    worst = next(
        (status for status in (Status.BAD, Status.WARN) if any(check.status is status for check in checks)), Status.GOOD
    )
    num_open = sum(check.status is Status.UNKNOWN for check in checks)
    num_asked = len(checks) - num_open
    not_asked = f" {count(num_open, 'check')} could not be made." if num_open else ""
    if measures.num_items < MIN_ITEMS:
        return Verdict(
            status=Status.UNKNOWN,
            headline="Too few items to judge",
            summary=f"Shares of {count(measures.num_items, 'item')} say little: a verdict needs at least {MIN_ITEMS}.",
            checks=checks,
        )
    failed = [check.name.lower() for check in checks if check.status is worst]
    if worst is Status.GOOD:
        headline, summary = "Healthy", f"All {num_asked} checks pass; nothing needs to change."
    elif worst is Status.WARN:
        headline = "Usable, could be better"
        summary = f"{count(len(failed), 'check')} of {num_asked} below the threshold: {', '.join(failed)}."
    else:
        headline = "Not healthy"
        summary = f"Do not train a recommender on these ids yet. Failed: {', '.join(failed)}."
    return Verdict(status=worst, headline=headline, summary=summary + not_asked, checks=checks)
