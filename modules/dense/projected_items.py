"""A catalogue's items as a retrieval model sees them, computed once for all rankers and only again where needed."""

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import InputError
from modules.item_table import ItemTable
from modules.model import EncoderDecoderRetrievalModel
from modules.ranking import evaluation_mode

_BLOCK_ITEMS = 8192
"""Items that are projected at once, which bounds the memory."""


class ProjectedItems:
    """The item vectors of a model's catalogue; they follow its weights and its device.

    Args:
        model: with `config.items`.
        items: of the whole catalogue, on any device.

    Raises:
        InputError: if the model reads no item features, or those of another width.
    """

    def __init__(self, model: EncoderDecoderRetrievalModel, items: ItemTable) -> None:
        self.model = model
        _check_width(model, items)
        self._items = items
        self._vectors: Tensor | None = None
        self._unit: Tensor | None = None
        self._key: Hashable = None

    @classmethod
    def of(cls, model: EncoderDecoderRetrievalModel, items: "ItemTable | ProjectedItems | None") -> "ProjectedItems":
        """Those of a table, or the ones that are given.

        Raises:
            InputError: if there are none, or as the constructor.
        """
        if items is None:
            raise InputError(
                "the model reads item features, got no items. Give the ranker the ItemTable of the catalogue."
            )
        return items if isinstance(items, ProjectedItems) else cls(model, items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def cold(self) -> Tensor:
        """[N] bool, true where no training range contains the item."""
        return self._items.cold

    def vectors(self) -> Tensor:
        """[N, D] from `project_items`, in fp32 whatever autocast says.

        The same tensor at every call, changed in place, until the catalogue or the device changes.
        """
        device = next(self.model.parameters()).device
        vectors, known = self._vectors, self._key
        if vectors is None or vectors.device != device:
            vectors, known = self._room(len(self), device), None
        with evaluation_mode(self.model):
            key = self.model.weights_key()
            if key != known:
                self._key = None  # nothing counts as projected if this is interrupted
                self._project_(vectors, self._items, torch.arange(len(self)))
                self._vectors, self._unit, self._key = vectors, None, key
        return vectors

    def unit(self) -> Tensor:
        """[N, D] vectors of length one, whose dot products with queries are the model's scores."""
        vectors = self.vectors()
        if self._unit is None:
            self._unit = F.normalize(vectors, dim=1)
        return self._unit

    def refresh(self, items: ItemTable) -> None:
        """Take over a catalogue with new items, or other features; only those are projected.

        Raises:
            InputError: if the features are of another width; nothing has changed then.
        """
        if items is self._items:
            return
        _check_width(self.model, items)
        if self._vectors is not None and self._vectors.device != next(self.model.parameters()).device:
            self._vectors = None
        if self._vectors is not None:
            rows = _changed_rows(self._items, items)
            vectors = self._room(len(items), self._vectors.device)
            num_kept = min(len(self), len(items))
            vectors[:num_kept] = self._vectors[:num_kept]
            with evaluation_mode(self.model):
                self._project_(vectors, items, rows)
            self._vectors, self._unit = vectors, None
        self._items = items

    def check_rows(self, num_items: int, items: ItemTable | None = None) -> None:
        """InputError if these items, or those that are to replace them, are not as many as a catalogue has."""
        num_rows = len(self) if items is None else len(items)
        if num_rows != num_items:
            raise InputError(
                f"the ranker expected features of all {num_items} items of the tokenizer's catalogue, got {num_rows} "
                "rows. Add items to the tokenizer and to the ItemTable alike."
            )

    def _room(self, num_items: int, device: torch.device) -> Tensor:
        """[N, D] for vectors, which can be changed in place in and outside of inference mode."""
        with torch.inference_mode(False):
            return torch.empty(num_items, self.model.config.d_model, device=device)

    @torch.no_grad()
    def _project_(self, vectors: Tensor, items: ItemTable, rows: Tensor) -> None:
        """Put the vectors of some rows of a table into their places, block by block."""
        with torch.autocast(vectors.device.type, enabled=False):
            for block in rows.to(items.features.device).split(_BLOCK_ITEMS):
                part = ItemTable(items.features[block], items.missing[block], items.cold[block]).to(vectors.device)
                vectors[block.to(vectors.device)] = self.model.project_items(part)


def _changed_rows(before: ItemTable, after: ItemTable) -> Tensor:
    """[M] int64 rows of `after` that are new, or have other features than in `before`."""
    num_common = min(len(before), len(after))
    changed = torch.ones(len(after), dtype=torch.bool, device=after.missing.device)
    for begin in range(0, num_common, _BLOCK_ITEMS):
        part = slice(begin, min(begin + _BLOCK_ITEMS, num_common))
        old, new = before.features[part].to(changed.device), after.features[part]
        changed[part] = (old != new).any(dim=1) | (before.missing[part].to(changed.device) != after.missing[part])
    return changed.nonzero().squeeze(1)


def _check_width(model: EncoderDecoderRetrievalModel, items: ItemTable) -> None:
    config = model.config.items
    if config is None:
        raise InputError(
            "the model reads no item features: it was trained without RetrievalModelConfig.items. Give its ranker none."
        )
    if items.width != config.num_features:
        raise InputError(
            f"the model expected item features of width {config.num_features}, got {items.width}. Encode the items as "
            "those that the model was trained with."
        )
