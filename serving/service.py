"""What the server asks of the recommender, and how answers look.

`answer`, `add` and `remove` touch the recommender and are run by the batcher's thread alone; `search` may run in any.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.schemas import Catalogue, InputError
from modules.artifact import ModelArtifact
from modules.recommender import RankedList, Recommender
from serving.requests import ItemsBody, NewItem, RecommendBody, RequestError

EncodeTexts = Callable[[Sequence[dict[str, str]]], np.ndarray]
"""[M, D] float32 features from M items' text fields; InputError where that is not possible."""

Content = dict[str, Any]

_WIDTH = 32
"""Items that are listed at least, before a list is cut to its length, by rankers without beams."""


@dataclass(frozen=True)
class _Row:
    """One history of a query, as far as the catalogue knows it.

    Attributes:
        history: its known item keys; `unknown` are the others.
        user: key, or None.
        allow, deny: known item keys, or None where nothing is said.
    """

    history: list[str]
    unknown: list[str]
    user: str | None
    allow: list[str] | None
    deny: list[str] | None


@dataclass(frozen=True)
class _Index:
    """Lower-case key and title of every item of a catalogue, for searching."""

    catalogue: Catalogue
    texts: list[str]


class RecommendService:
    """A recommender behind JSON.

    Args:
        recommender: touched by one thread.
        save_to: where every change of the catalogue is saved before it is answered; None saves nothing.
        encode_texts: features of items that come with text instead; None takes features alone.
    """

    def __init__(
        self, recommender: Recommender, *, save_to: Path | None = None, encode_texts: EncodeTexts | None = None
    ) -> None:
        self._recommender = recommender
        self._save_to = save_to
        self._encode_texts = encode_texts
        self._index: _Index | None = None

    @property
    def num_items(self) -> int:
        """Items that can be recommended."""
        available = self._artifact().available
        return len(self._recommender.catalogue) if available is None else int(available.sum())

    @property
    def catalogue_version(self) -> int:
        """Grows by one with every change of the catalogue."""
        return self._artifact().catalogue_version

    @property
    def mode(self) -> str:
        """Name of the ranker that answers."""
        return self._recommender.ranker.name

    def answer(self, queries: Sequence[RecommendBody]) -> list[Content | Exception]:
        """The content of every query's response, or the error that it ends in.

        Queries of the same beam width share one search, whatever their k and their filters; so what a query gets does
        not depend on its company.
        """
        outcomes: list[Content | Exception] = [{} for _ in queries]
        groups: dict[int, list[tuple[int, list[_Row]]]] = defaultdict(list)
        for place, query in enumerate(queries):
            try:
                rows = self._rows(query)
            except RequestError as error:
                outcomes[place] = error
            else:
                groups[self._width(query.k)].append((place, rows))
        for width, members in groups.items():
            lists = iter(self._recommend([row for _, rows in members for row in rows], width))
            for place, rows in members:
                outcomes[place] = {"lists": [self._list(row, next(lists), queries[place].k) for row in rows]}
        return outcomes

    def features(self, items: Sequence[NewItem]) -> np.ndarray:
        """[M, D] float32 features of new items, sent or encoded; may take seconds and touches no recommender.

        Raises:
            RequestError: if they cannot be had, or are not of one width.
        """
        if items[0].text is not None:
            return self._encoded([item.text or {} for item in items])
        width = len(items[0].features or ())
        for place, item in enumerate(items):
            if len(item.features or ()) != width:
                message = f"expected {width} numbers as in add[0], got {len(item.features or ())}."
                raise RequestError(422, f"add[{place}].features", message)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is refused
            return np.array([item.features for item in items], dtype=np.float32).reshape(len(items), width)

    def add(self, items: Sequence[NewItem], features: np.ndarray) -> Content:
        """Add items; the content of the response says which semantic ids they got."""
        titles = {item.item_key: item.title or (item.text or {}).get("title", "") for item in items}
        try:
            self._recommender.add_items(
                [item.item_key for item in items],
                features,
                titles=[titles[item.item_key] for item in items],
                categories=[item.category for item in items],
            )
        except InputError as error:
            raise RequestError(422, "add", str(error)) from error
        return self._changed({"added": [self._item(key, title) for key, title in titles.items()]})

    def remove(self, item_keys: Sequence[str]) -> Content:
        """Remove items; they are neither recommended nor found any more."""
        try:
            self._recommender.remove_items(item_keys)
        except InputError as error:
            raise RequestError(422, "remove", str(error)) from error
        return self._changed({"removed": list(item_keys)})

    def change(self, body: ItemsBody) -> Callable[[], Content]:
        """What the batcher's thread shall run for `POST /items`; features are got ready here.

        Raises:
            RequestError: if they cannot be, or the model's items cannot change.
        """
        try:
            self._artifact().tokenizer_for("changing items")
        except InputError as error:
            raise RequestError(422, "add" if body.remove is None else "remove", str(error)) from error
        if body.add is None:
            return lambda: self.remove(body.remove or [])
        items, features = body.add, self.features(body.add)
        return lambda: self.add(items, features)

    def search(self, text: str, limit: int) -> Content:
        """Items whose key and title contain all words of a text, in catalogue order after the item of that very key."""
        found = [self._item(key, title) for key, title in islice(self._matches(text), limit)]
        return {"items": found, "num_items": self.num_items}

    def _matches(self, text: str) -> Iterator[tuple[str, str]]:
        """Keys and titles."""
        if text in self._recommender and self._recommender.is_available(text):
            name = self._recommender.display_name(text)
            yield text, "" if name == text else name
        index, words = self._current_index(), text.lower().split()
        columns = (index.texts, index.catalogue.item_keys, index.catalogue.titles)
        for indexed, key, title in zip(*columns, strict=True):
            if all(word in indexed for word in words) and key != text and self._recommender.is_available(key):
                yield key, title

    def _current_index(self) -> _Index:
        catalogue, index = self._recommender.catalogue, self._index
        if index is None or index.catalogue is not catalogue:
            pairs = zip(catalogue.item_keys, catalogue.titles, strict=True)
            index = self._index = _Index(catalogue, [f"{key}\n{title}".lower() for key, title in pairs])
        return index

    def _width(self, k: int) -> int:
        """The ranker's beam width, or for longer lists one of a few: on a GPU every width is recorded by itself."""
        width = getattr(self._recommender.ranker, "beam_width", _WIDTH)
        return width if k <= width else 1 << (k - 1).bit_length()

    def _rows(self, query: RecommendBody) -> list[_Row]:
        """RequestError if a history has no item that the catalogue knows."""
        allow, deny = self._known(query.allow), self._known(query.deny)
        histories = query.rows()
        rows = []
        for place, (history, user) in enumerate(zip(histories, query.users or [None] * len(histories), strict=True)):
            known = self._known(history) or []
            unknown = [key for key in history if key not in self._recommender]
            if not known:
                raise RequestError(422, query.field_of(place), f"the catalogue has none of its {len(history)} items.")
            denied = [*(deny or ()), *known] if query.exclude_seen else deny
            rows.append(_Row(known, unknown, user, allow, denied))
        return rows

    def _known(self, item_keys: Sequence[str] | None) -> list[str] | None:
        return None if item_keys is None else [key for key in item_keys if key in self._recommender]

    def _recommend(self, rows: Sequence[_Row], k: int) -> list[RankedList]:
        return self._recommender.recommend(
            [row.history for row in rows],
            min(k, len(self._recommender.catalogue)),
            users=[row.user for row in rows],
            allow=_unless_empty([row.allow for row in rows]),
            deny=_unless_empty([row.deny for row in rows]),
        )

    def _list(self, row: _Row, ranked: RankedList, k: int) -> Content:
        items = [{**self._item(found.item_key, found.title), "score": found.score} for found in islice(ranked, k)]
        return {"items": items, "complete": len(items) == k, "unknown": row.unknown}

    def _item(self, item_key: str, title: str) -> Content:
        """With its semantic id, where the model has such."""
        item: Content = {"item_key": item_key, "title": title}
        if self._artifact().tokenizer is not None:
            item["semantic_id"] = list(self._recommender.semantic_id(item_key))
        return item

    def _artifact(self) -> ModelArtifact:
        artifact = self._recommender.artifact
        assert artifact is not None  # from_pretrained gives one
        return artifact

    def _encoded(self, texts: Sequence[dict[str, str]]) -> np.ndarray:
        if self._encode_texts is None:
            raise RequestError(422, "add[0].text", "this server has no encoder for texts; send features.")
        try:
            return self._encode_texts(texts)
        except InputError as error:
            raise RequestError(422, "add[0].text", str(error)) from error

    def _changed(self, content: Content) -> Content:
        if self._save_to is not None:
            try:
                self._recommender.save_pretrained(self._save_to)
            except (InputError, OSError) as error:
                message = f"the catalogue is changed in memory, but could not be saved: {error}"
                raise RequestError(500, None, message) from error
        catalogue = {"num_items": self.num_items, "version": self.catalogue_version}
        return {**content, "catalogue": catalogue, "saved": self._save_to is not None}


def _unless_empty(sets: list[list[str] | None]) -> list[list[str] | None] | None:
    """None where nobody says anything."""
    return sets if any(of_row is not None for of_row in sets) else None
