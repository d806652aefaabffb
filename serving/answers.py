"""Blocks of JSON lines answered with ranked lists, as JSON for programs or as tables for people."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from modules.recommender import RankedList, Recommender
from serving.jsonl import Block, Problem, Request, parse_block

TITLE_WIDTH = 60


class Answer(NamedTuple):
    """What a block of lines has come to: the output's text, and the lines that could not be used."""

    text: str
    num_histories: int
    problems: list[Problem]


@dataclass(frozen=True, eq=False)
class Answerer:
    """Ranks for requests, all in the same way.

    Attributes:
        recommender: is asked for one list per request.
        top_k: items per list.
        format: name in FORMATS.
        exclude_seen: leave out the items of the history itself.
        allow: keys of the only items that may be listed, or None.
        deny: keys of items that may not be listed, or None.
    """

    recommender: Recommender
    top_k: int
    format: str
    exclude_seen: bool = False
    allow: frozenset[str] | None = None
    deny: frozenset[str] | None = None

    def answer_block(self, block: Block) -> Answer:
        """The lists for a block's lines, in their order; lines without a known item are problems too."""
        numbered, problems = parse_block(block)
        requests = []
        for number, request in numbered:
            if any(key in self.recommender for key in request.history):
                requests.append(request)
            else:
                what = "no item of the history is in the catalogue" if request.history else "the history is empty"
                problems.append(Problem(number, what))
        return Answer(self.answer(requests), len(requests), sorted(problems))

    def answer(self, requests: list[Request]) -> str:
        """The lists of some requests, one after the other.

        Raises:
            InputError: see `Recommender.recommend`.
        """
        lists = self.recommender.recommend(
            [request.history for request in requests],
            self.top_k,
            users=[request.user_key() for request in requests],
            exclude_seen=self.exclude_seen,
            allow=self.allow,
            deny=self.deny,
        )
        write = FORMATS[self.format]
        return "".join(write(self.recommender, *pair) for pair in zip(requests, lists, strict=True))


def as_json(_: Recommender, request: Request, items: RankedList) -> str:
    """One line of JSON."""
    places = [{"item_key": item.item_key, "score": item.score, "title": item.title} for item in items]
    content = {"user": request.user, "items": places, "complete": items.complete}
    return json.dumps(content, ensure_ascii=False) + "\n"


def as_table(recommender: Recommender, request: Request, items: RankedList) -> str:
    """The history by title, then the ranked items."""
    lines = [] if request.user is None else [f"User {request.user}"]
    lines.append("History, oldest first")
    lines += [
        f"      {_shortened(recommender.display_name(key)):{TITLE_WIDTH}}  {key}"
        for key in request.history
        if key in recommender
    ]
    width = max((len(item.item_key) for item in items), default=0)
    lines.append("Recommended")
    for rank, item in enumerate(items, start=1):
        title = _shortened(item.title or item.item_key)
        lines.append(f"{rank:4}. {title:{TITLE_WIDTH}}  {item.item_key:{width}}  {item.score:9.4f}")
    return "\n".join(lines) + "\n\n"


FORMATS: dict[str, Callable[[Recommender, Request, RankedList], str]] = {"table": as_table, "json": as_json}


def _shortened(title: str) -> str:
    """A title that fits its column."""
    title = " ".join(title.split())
    return title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 3] + "..."
