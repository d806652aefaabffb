"""What models share that read histories of item ids and predict the next item at every position."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import ops
from data.schemas import NO_TARGET, InputError, SeqBatch
from modules.config_names import check_names

INITIAL_STD = 0.02
"""Of embeddings. Items that start near each other are told apart by what is learned: on Amazon Beauty a SASRec had
validation NDCG@10 .034 after eight epochs, and .025 where items started as vectors of about unit length."""


@dataclass(frozen=True, kw_only=True)
class NextItemConfig:
    """Sizes that every such model has.

    Attributes:
        num_items: N, items of the catalogue; 0 until the data is known, and a model cannot be built then.
        d_model: D, width of items and states.
        max_history: the model reads no more items than the last so many of a history.
        dropout: everywhere where the model has it.

    Raises:
        InputError: for a value out of range.
    """

    num_items: int = 0
    d_model: int = 64
    max_history: int = 20
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lowest = 0 if name == "num_items" else 1
            if isinstance(value, int) and value < lowest:
                raise InputError(f"{type(self).__name__} expected {name} of at least {lowest}, got {value}.")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"{type(self).__name__} expected dropout in [0, 1), got {self.dropout}.")

    def build(self) -> "NextItemModel":
        """A model of these sizes with random weights."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A config from what `to_dict` gave.

        Raises:
            InputError: on unknown names or values out of range.
        """
        check_names(cls, values)
        return cls(**values)


class NextItemModel(nn.Module):
    """One learned vector per item, which the model reads and compares its states with.

    A subclass says how a history becomes states.

    Args:
        config: sizes, with num_items.
        num_dropouts: ops with dropout in one `encode`.

    Raises:
        InputError: if the number of items is not known.
    """

    name: str
    """Of the system in artifacts, and of its ranker."""

    _zero: Tensor

    def __init__(self, config: NextItemConfig, *, num_dropouts: int) -> None:
        super().__init__()
        if config.num_items == 0:
            raise InputError(f"{type(self).__name__} expected num_items of at least 1, got 0. Set it from the data.")
        self.config = config
        self._num_dropouts = num_dropouts
        self.items = nn.Parameter(torch.randn(config.num_items, config.d_model) * INITIAL_STD)
        # A buffer moves with the module: a number made at every call would be copied to the device every time.
        self.register_buffer("_zero", torch.zeros(1, dtype=torch.int64), persistent=False)

    def encode(self, batch: SeqBatch) -> Tensor:
        """[T, D] states: what each position, having read the items up to its own, expects next."""
        raise NotImplementedError

    def forward(self, batch: SeqBatch) -> dict[str, Tensor]:
        """Training loss: cross-entropy over the whole catalogue, averaged over all positions with a next item.

        Args:
            batch: rows of at most max_history items; their targets follow their last items.

        Returns:
            "loss", fp32.

        Raises:
            ValueError: if rows are too long, or an id is beyond num_items.
        """
        with self._dropout_seeds(batch.item_ids.device):
            states = self.encode(batch)
        loss = ops.catalogue_cross_entropy(states, self.items, next_items(batch), ignore_index=NO_TARGET)
        return {"loss": loss}

    def queries(self, batch: SeqBatch) -> Tensor:
        """[B, D] states at the rows' last items, zeros for empty rows; scores are products with `item_vectors`."""
        lengths = batch.offsets.diff()
        states = pad(self.encode(batch), (0, 0, 0, 1))
        return states[(batch.offsets[1:] - 1).where(lengths > 0, len(states) - 1)]

    def item_vectors(self) -> Tensor:
        """[N, D]."""
        return self.items

    def look_up(self, batch: SeqBatch) -> Tensor:
        """[T, D] vectors of a batch's items times the square root of their width (Vaswani et al. 2017, section 3.4).

        Raises:
            ValueError: if a row may be longer than max_history, or an id is beyond num_items.
        """
        if batch.max_len > self.config.max_history:
            raise ValueError(
                f"{type(self).__name__} expected rows of at most max_history = {self.config.max_history} items, "
                f"got {batch.max_len}. Cut the histories to their last items."
            )
        return self.rows_of(self.items, batch.item_ids) * self.config.d_model**0.5

    def rows_of(self, table: Tensor, row_numbers: Tensor) -> Tensor:
        """[T, D] rows of a table [R, D]; their gradients add up in a fixed order."""
        return ops.semantic_id_embedding(row_numbers[:, None], table, self._zero)[:, 0]

    def _dropout_seeds(self, device: torch.device) -> AbstractContextManager[None]:
        """One draw for all dropout in kernels."""
        if not self.training or self.config.dropout == 0.0 or device.type == "cpu" or torch.compiler.is_compiling():
            return nullcontext()
        return ops.dropout_seeds(self._num_dropouts, device)


def next_items(batch: SeqBatch) -> Tensor:
    """[T] int64 item after every position: the next one of its row, the row's target after its last.

    NO_TARGET where a row has no target, and in the tail of a batch of fixed capacity.
    """
    places, rows = _places_and_rows(batch)
    targets = batch.offsets.new_full((len(batch),), NO_TARGET).long() if batch.targets is None else batch.targets
    is_last = places + 1 >= pad(batch.offsets[1:], (0, 1))[rows]  # everything in the tail is
    return pad(targets, (0, 1), value=NO_TARGET)[rows].where(is_last, batch.item_ids.roll(-1))


def positions_in_rows(batch: SeqBatch) -> Tensor:
    """[T] int64 number of every item within its row, from 0; 0 in the tail of a batch of fixed capacity."""
    places, rows = _places_and_rows(batch)
    return (places - batch.offsets[rows]).where(rows < len(batch), 0)


def _places_and_rows(batch: SeqBatch) -> tuple[Tensor, Tensor]:
    """[T] int64 places 0..T-1 and the rows that they belong to, B in the tail."""
    places = torch.arange(len(batch.item_ids), device=batch.item_ids.device)
    return places, torch.bucketize(places, batch.offsets[1:].long(), right=True)
