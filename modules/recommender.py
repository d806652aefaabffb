"""The public face of the library: item keys in, ranked item keys out, around any Ranker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Catalogue, InputError, ItemFilter, SeqBatch, user_hashes
from modules.artifact import ModelArtifact, load_model_artifact
from modules.catalogue_changes import with_items, without_items
from modules.feature_rows import FeatureMatrix
from modules.item_lists import ItemKeys, ItemLists, first_few, warn_of_unknown_keys
from modules.similar_items import similar_items
from modules.tokenizer.tokenizer import SemanticIdTokenizer


class _Ranks(Protocol):
    """What is used here of `evaluation.ranker.Ranker`, which lies above this room."""

    name: str

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Recommendation:
    """One place of a ranked list.

    Attributes:
        item_key: the source's own id.
        score: the ranker's; comparable within a list only.
        title: "" where the catalogue has none.
    """

    item_key: str
    score: float
    title: str


class RankedList(list[Recommendation]):
    """Recommendations, best first.

    Attributes:
        complete: false where there are fewer items that may be listed than were asked for.
    """

    def __init__(self, items: Sequence[Recommendation], *, complete: bool) -> None:
        super().__init__(items)
        self.complete = complete


class Recommender:
    """Recommends items of a catalogue, which may grow and shrink meanwhile.

    Reading calls may run in several threads as far as the ranker can. `add_items` and `remove_items` change the ranker
    in place: while one of them runs nothing else may, which is for the caller's lock to see to.

    >>> recommender = Recommender.from_pretrained("runs/beauty")  # doctest: +SKIP
    >>> recommender.recommend([["B004756YJA", "B0020YLEYK"]], k=3)  # doctest: +SKIP

    Attributes:
        ranker: ranks the catalogue's items.
        catalogue: all items that there are or were; the place of an item is its id.
        artifact: what the ranker was made from; None where it came without one.
    """

    def __init__(self, ranker: _Ranks, catalogue: Catalogue, *, artifact: ModelArtifact | None = None) -> None:
        self.ranker = ranker
        self.catalogue = catalogue
        self.artifact = artifact
        self._item_ids = {item_key: item_id for item_id, item_key in enumerate(catalogue.item_keys)}
        self._lists = ItemLists(self._item_ids)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: Path | str,
        *,
        device: torch.device | str | None = None,
        beam_width: int | None = None,
        batch_size: int | None = None,
        mode: str | None = None,
    ) -> "Recommender":
        """A recommender from a model artifact.

        Args:
            folder_or_hub_id: artifact folder, run folder or Hub repository.
            device: where the model runs; None takes a GPU if there is one.
            beam_width: instead of the artifact's own.
            batch_size: histories ranked at once; None takes the ranker's default.
            mode: of retrieval, for models that have several: "generative", "dense", "hybrid@20", ...; None takes the
                artifact's own.

        Raises:
            InputError: if the artifact is missing, damaged or of another format, or its model has no such mode or beam.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        artifact = load_model_artifact(folder_or_hub_id, device=device)
        ranker = artifact.make_ranker(mode=mode, beam_width=beam_width, batch_size=batch_size)
        return cls(ranker, artifact.catalogue, artifact=artifact)

    def __contains__(self, item_key: object) -> bool:
        """Whether histories may have the item; removed ones are still known."""
        return item_key in self._item_ids

    def is_available(self, item_key: str) -> bool:
        """Whether an item of the catalogue may be recommended, which removed ones may not."""
        available = None if self.artifact is None else self.artifact.available
        return available is None or bool(available[self._item_ids[item_key]])

    def display_name(self, item_key: str) -> str:
        """Title of an item of the catalogue, or its key where it has no title."""
        return self.catalogue.display_name(self._item_ids[item_key])

    def semantic_id(self, item_key: str) -> tuple[int, ...]:
        """Codes of an item of the catalogue; where the tokenizer adds dedup codes, that is the last."""
        return tuple(self._tokenizer("semantic_id").semantic_ids[self._item_ids[item_key]].tolist())

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        users: Sequence[str | None] | None = None,
        exclude_seen: bool = False,
        allow: ItemKeys = None,
        deny: ItemKeys = None,
    ) -> list[RankedList]:
        """Ranked items for every history.

        Item keys that the catalogue lacks are skipped with a warning, wherever they are given.

        Args:
            histories: item keys per user, oldest first.
            k: items per list; a list is shorter, and not `complete`, only where fewer items may be listed, or a ranker
                that looks at a few candidates alone (hybrid@K) has fewer.
            users: user key per history, for models that read a user token; None, in whole or in part, is the unknown
                user, whose hash is 0.
            exclude_seen: leave out the items of the history itself.
            allow: the only items that may be listed: item keys for all histories, or one collection or None for each.
                A frozenset for all of them is read once for as long as it is given again.
            deny: items that may not be listed, likewise.

        Returns:
            one list per history, best first.

        Raises:
            InputError: if a history is empty or has no known item, k is below 1, or there are not
                as many users, or collections of item keys, as histories.
        """
        _check_k(k)
        batch = SeqBatch.from_lists(known := self._known_item_ids(histories))
        if users is not None:
            batch = replace(batch, user_hashes=_hashes(users, num_rows=len(batch)))
        allowed = self._lists.item_filter(known if exclude_seen else [[] for _ in histories], allow=allow, deny=deny)
        return self._ranked_lists(*self.ranker.rank(batch, self._at_most(k), allowed), k)

    def similar_items(
        self, item_keys: Sequence[str], k: int = 10, *, allow: ItemKeys = None, deny: ItemKeys = None
    ) -> list[RankedList]:
        """For every item the others that are most like it.

        Args:
            item_keys: of the catalogue; removed items have neighbours too, but are none.
            k: items per list.
            allow: the only items that may be listed, as for `recommend`.
            deny: items that may not be listed, likewise.

        Returns:
            one list per item, best first; scores are cosines of quantised latent vectors, equal ones go by item id.

        Raises:
            InputError: if a key is unknown, k is below 1, or the recommender has no artifact, or one whose ids were
                imported without a quantizer.
        """
        tokenizer = self._tokenizer("similar_items")
        _check_k(k)
        if isinstance(item_keys, str):
            raise InputError(f"expected a list of item keys, got the string {item_keys!r}. Write [{item_keys!r}].")
        unknown = [key for key in item_keys if key not in self._item_ids]
        if unknown:
            raise InputError(
                f"the catalogue has no item {first_few(unknown)}. Item keys are the data source's own ids."
            )
        item_ids = [self._item_ids[key] for key in item_keys]
        item_filter = self._lists.item_filter([[item_id] for item_id in item_ids], allow=allow, deny=deny)
        if item_filter is None:
            return []
        if tokenizer.available is not None:
            allowed = tokenizer.available if item_filter.allowed is None else tokenizer.available & item_filter.allowed
            item_filter = replace(item_filter, allowed=allowed)
        return self._ranked_lists(*similar_items(tokenizer, item_ids, self._at_most(k), item_filter), k)

    def add_items(
        self,
        item_keys: Sequence[str],
        features: FeatureMatrix,
        titles: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        *,
        feature_description: Mapping[str, Any] | None = None,
    ) -> None:
        """Add items, or put removed ones back, without training; see `modules.catalogue_changes.with_items`.

        The ids of the other items stay. Nothing is written: see `save_pretrained`.

        Raises:
            InputError: as `modules.catalogue_changes.with_items`, or if the recommender has no artifact that can
                change; nothing has changed then.
        """
        self._change(
            with_items(
                self._artifact(),
                item_keys,
                features,
                titles=titles,
                categories=categories,
                feature_description=feature_description,
            )
        )

    def remove_items(self, item_keys: Sequence[str]) -> None:
        """Recommend some items no more; histories may still have them. Nothing is written: see `save_pretrained`.

        Raises:
            InputError: as `modules.catalogue_changes.without_items`, or if the recommender has no artifact that can
                change; nothing has changed then.
        """
        self._change(without_items(self._artifact(), item_keys))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model artifact with its catalogue of now, whole or not at all.

        Raises:
            InputError: if the recommender has no artifact, something else is at that place, or it cannot be written.
        """
        self._artifact().save(folder)

    def _artifact(self) -> ModelArtifact:
        if self.artifact is None:
            raise InputError(
                "this Recommender has no model artifact. Make it with Recommender.from_pretrained(folder)."
            )
        return self.artifact

    def _tokenizer(self, purpose: str) -> SemanticIdTokenizer:
        return self._artifact().tokenizer_for(purpose)

    def _change(self, artifact: ModelArtifact) -> None:
        """Put the artifact of another version of the catalogue in the place of the one there is."""
        if artifact is self.artifact:
            return
        refresh = getattr(self.ranker, "refresh", None)
        if refresh is None:
            raise InputError(f"the ranker {type(self.ranker).__name__} cannot change its catalogue. Load it again.")
        refresh(artifact.tokenizer, artifact.items)
        added = artifact.catalogue.item_keys[len(self.catalogue) :]
        new_ids = range(len(self.catalogue), len(artifact.catalogue))
        self.artifact = artifact
        self.catalogue = artifact.catalogue
        self._item_ids.update(zip(added, new_ids, strict=True))  # last: who looks up a key finds all of the item

    def _at_most(self, k: int) -> int:
        return min(k, len(self.catalogue))

    def _known_item_ids(self, histories: Sequence[Sequence[str]]) -> list[list[int]]:
        known: list[list[int]] = []
        unknown: dict[str, None] = {}
        for row, history in enumerate(histories):
            if isinstance(history, str):
                raise InputError(
                    f"expected a list of histories, each a list of item keys, got the string {history!r} as history "
                    f"{row}. Write recommend([history]) for one history."
                )
            known.append([self._item_ids[key] for key in history if key in self._item_ids])
            missing = [key for key in history if key not in self._item_ids]
            if not known[-1]:
                raise InputError(_no_known_item(row, missing))
            unknown.update(dict.fromkeys(missing))
        if unknown:
            warn_of_unknown_keys(list(unknown), num_items=len(self.catalogue), stacklevel=3)
        return known

    def _ranked_lists(self, item_ids: Tensor, scores: Tensor, k: int) -> list[RankedList]:
        keys, titles = self.catalogue.item_keys, self.catalogue.titles
        lists = []
        for ids, values in zip(item_ids.tolist(), scores.tolist(), strict=True):
            items = [
                Recommendation(keys[item_id], score, titles[item_id])
                for item_id, score in zip(ids, values, strict=True)
                if item_id != NO_ITEM
            ]
            lists.append(RankedList(items, complete=len(items) == k))
        return lists


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"expected k of at least 1, the length of a list, got {k}.")


def _hashes(users: Sequence[str | None], *, num_rows: int) -> Tensor:
    """[B] int64, as the prepared dataset stores them; 0 for None."""
    if isinstance(users, str) or len(users) != num_rows:
        raise InputError(f"expected one user key or None per history, {num_rows} in all, got {users!r}.")
    known = torch.tensor([user is not None for user in users], dtype=torch.bool)
    return torch.from_numpy(user_hashes([user or "" for user in users])).where(known, 0)


def _no_known_item(row: int, unknown: list[str]) -> str:
    if not unknown:
        return f"history {row} is empty; expected at least one item key."
    return (
        f"history {row} has no item that the catalogue knows; got {len(unknown)} unknown keys: {first_few(unknown)}. "
        "Item keys are the data source's own ids, as in the model's catalogue."
    )
