"""What a model that reads item features keeps of every item: the features, which are missing, and who is cold."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.schemas import InputError, read_safetensors

_COLUMNS = ("features", "missing", "cold")


@dataclass(frozen=True, eq=False)
class ItemTable:
    """Rows of all items of a catalogue; row i belongs to item_id i.

    Attributes:
        features: [N, D_in] float32 as the feature encoder gave them; finite but without meaning where missing.
        missing: [N] bool, true where an item has no features.
        cold: [N] bool, true where no training range of the model's split contains the item.

    Raises:
        InputError: if the columns are not of one length, or of other dtypes.
    """

    features: Tensor
    missing: Tensor
    cold: Tensor

    def __post_init__(self) -> None:
        num_items = len(self.features)
        expected = {"features": (torch.float32, 2), "missing": (torch.bool, 1), "cold": (torch.bool, 1)}
        for name, (dtype, rank) in expected.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.dim() != rank or len(column) != num_items:
                raise InputError(
                    f"ItemTable.{name} expected {num_items} rows of {dtype} in {rank} dimensions, "
                    f"got {list(column.shape)} of {column.dtype}."
                )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        """D_in, the width of the features."""
        return self.features.shape[1]

    def to(self, device: torch.device | str) -> "ItemTable":
        """The same rows on another device."""
        return ItemTable(*(getattr(self, name).to(device) for name in _COLUMNS))

    def with_rows(self, rows: Tensor, features: Tensor) -> "ItemTable":
        """The table after a change of the catalogue; a new object, what is here stays.

        Args:
            rows: [M] int64: rows that exist get new features and stay as cold as they are, rows from N on are
                appended, without a gap, and are cold.
            features: [M, D_in] float32.

        Raises:
            InputError: if the features are of another shape.
        """
        if features.shape != (len(rows), self.width):
            raise InputError(
                f"ItemTable expected features of shape {[len(rows), self.width]}, got {list(features.shape)}. "
                "Encode the new items as those that the model was trained with."
            )
        num_new = int((rows >= len(self)).sum())
        grown = replace(
            self,
            features=torch.cat([self.features, self.features.new_zeros(num_new, self.width)]),
            missing=torch.cat([self.missing, self.missing.new_zeros(num_new)]),
            cold=torch.cat([self.cold, self.cold.new_ones(num_new)]),
        )
        grown.features[rows] = features.to(grown.features)
        grown.missing[rows] = False
        return grown

    def save(self, path: Path) -> None:
        """Write as one safetensors file."""
        save_file({name: getattr(self, name).cpu().contiguous() for name in _COLUMNS}, path)

    @classmethod
    def load(cls, path: Path) -> "ItemTable":
        """Read what `save` wrote; InputError when the file is missing, truncated or of another kind."""
        tensors = read_safetensors(path)
        missing = [name for name in _COLUMNS if name not in tensors]
        if missing:
            raise InputError(f"{path} is not an item table: it lacks {', '.join(missing)}.")
        try:
            return cls(*(tensors[name] for name in _COLUMNS))
        except InputError as error:
            raise InputError(f"{path}: {error} Copy the artifact again.") from error
