"""The public face of the library: item keys in, ranked item keys out, around any Ranker."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Catalogue, InputError, SeqBatch, user_hashes
from modules.artifact import load_model_artifact


class _Ranks(Protocol):
    """What is used here of `evaluation.ranker.Ranker`, which lies above this room."""

    def rank(self, histories: SeqBatch, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


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


class Recommender:
    """Recommends items of a catalogue.

    >>> recommender = Recommender.from_pretrained("runs/beauty")  # doctest: +SKIP
    >>> recommender.recommend([["B004756YJA", "B0020YLEYK"]], k=3)  # doctest: +SKIP
    """

    def __init__(self, ranker: _Ranks, catalogue: Catalogue) -> None:
        self.ranker = ranker
        self.catalogue = catalogue
        self._item_ids = {item_key: item_id for item_id, item_key in enumerate(catalogue.item_keys)}

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: Path | str,
        *,
        device: torch.device | str | None = None,
        beam_width: int | None = None,
        batch_size: int | None = None,
    ) -> "Recommender":
        """A recommender from a model artifact.

        Args:
            folder_or_hub_id: artifact folder, run folder or Hub repository.
            device: where the model runs; None takes a GPU if there is one.
            beam_width: instead of the artifact's own.
            batch_size: histories ranked at once; None takes the ranker's default.

        Raises:
            InputError: if the artifact is missing, damaged or of another format.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        artifact = load_model_artifact(folder_or_hub_id, device=device)
        ranker = artifact.make_ranker(beam_width=beam_width, batch_size=batch_size)
        return cls(ranker, artifact.tokenizer.catalogue)

    def __contains__(self, item_key: object) -> bool:
        return item_key in self._item_ids

    def display_name(self, item_key: str) -> str:
        """Title of an item of the catalogue, or its key where it has no title."""
        return self.catalogue.display_name(self._item_ids[item_key])

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        users: Sequence[str | None] | None = None,
        exclude_seen: bool = False,
    ) -> list[list[Recommendation]]:
        """Ranked items for every history.

        Args:
            histories: item keys per user, oldest first. Keys that the catalogue lacks are skipped with a warning.
            k: items per list; a list is shorter only where fewer items may be listed.
            users: user key per history, for models that read a user token; None, in whole or in part, is the unknown
                user, whose hash is 0.
            exclude_seen: leave out the items of the history itself.

        Returns:
            one list per history, best first.

        Raises:
            InputError: if a history is empty or has no known item, k is not within 1..catalogue size, or there are not
                as many users as histories.
        """
        if not 1 <= k <= len(self.catalogue):
            raise InputError(f"expected k from 1 to {len(self.catalogue)}, the size of the catalogue, got {k}.")
        batch = SeqBatch.from_lists(self._known_item_ids(histories))
        if users is not None:
            batch = replace(batch, user_hashes=_hashes(users, num_rows=len(batch)))
        allowed = batch.unseen(len(self.catalogue)) if exclude_seen else None
        item_ids, scores = self.ranker.rank(batch, k, allowed)
        return [
            [self._recommendation(item_id, score) for item_id, score in zip(*row, strict=True) if item_id != NO_ITEM]
            for row in zip(item_ids.tolist(), scores.tolist(), strict=True)
        ]

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
            warnings.warn(
                f"skipped {len(unknown)} item keys that the catalogue of {len(self.catalogue)} items does not have: "
                f"{_first_few(list(unknown))}",
                stacklevel=3,
            )
        return known

    def _recommendation(self, item_id: int, score: float) -> Recommendation:
        return Recommendation(self.catalogue.item_keys[item_id], score, self.catalogue.titles[item_id])


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
        f"history {row} has no item that the catalogue knows; got {len(unknown)} unknown keys: {_first_few(unknown)}. "
        "Item keys are the data source's own ids, as in the tokenizer's catalogue."
    )


def _first_few(keys: list[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")
