"""How a retrieval model reads the features of items: one projection, of the whole catalogue at once."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import ops
from data.schemas import InputError
from modules.config_names import check_names
from modules.item_table import ItemTable
from modules.mlp import SkipMLP

_CONSTANT = 1e-6
"""Features whose deviation is a smaller share of their mean are constant but for rounding."""


@dataclass(frozen=True, kw_only=True)
class ItemInputConfig:
    """How item features enter a retrieval model (Yang et al. 2024, "LIGER").

    Attributes:
        num_features: D_in, width of the item features; 0 until they are known, and a model cannot be built then.
        hidden_dims: of the item projection, an MLP from D_in to d_model beside a linear shortcut.
        projection_dropout: in the item projection.
        num_positions: item positions in a history that have an embedding, counted from its first item that is read;
            at least the max_history that the model is trained with.
        input_dropout: on the encoder's normed input.
        temperature: cosines are divided by it in the loss over the catalogue.
    """

    num_features: int = 0
    hidden_dims: tuple[int, ...] = (768, 512, 256)
    projection_dropout: float = 0.1
    num_positions: int = 20
    input_dropout: float = 0.5
    temperature: float = 0.07

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        if self.num_features < 0 or self.num_positions < 1 or any(width < 1 for width in self.hidden_dims):
            raise InputError(
                "ItemInputConfig expected num_features of at least 0, num_positions and hidden_dims of at least 1, "
                f"got {self.num_features}, {self.num_positions} and {self.hidden_dims}."
            )
        for name in ("projection_dropout", "input_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"ItemInputConfig expected {name} in [0, 1), got {getattr(self, name)}.")
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"ItemInputConfig expected a positive temperature, got {self.temperature}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ItemInputConfig":
        """A config from its fields by name.

        Raises:
            InputError: on unknown names or values out of range.
        """
        check_names(cls, values)
        return cls(**values)


class ItemTower(nn.Module):
    """Projects features of items to the model's width; the encoder's input and the dense head share it.

    Features are standardised by the mean and deviation that `fit_` has found, which are buffers. Items without features
    share one learned vector.

    Args:
        config: sizes.
        d_model: width of the result.

    Raises:
        InputError: if the width of the features is not known.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: ItemInputConfig, d_model: int) -> None:
        super().__init__()
        if config.num_features < 1:
            raise InputError(
                "ItemTower expected ItemInputConfig.num_features of at least 1, got 0. Set it to the width of the item "
                "features."
            )
        self.num_features = config.num_features
        self.projection = _Projection((config.num_features, *config.hidden_dims, d_model), config.projection_dropout)
        self.missing = nn.Parameter(torch.randn(d_model))
        self.register_buffer("feature_mean", torch.zeros(config.num_features))
        self.register_buffer("feature_scale", torch.ones(config.num_features))

    def forward(self, features: Tensor, missing: Tensor) -> Tensor:
        """Vectors of items.

        Args:
            features: [N, D_in] float32 as the feature encoder gave them.
            missing: [N] bool, true where an item has none.

        Returns:
            [N, D], in the autocast dtype where autocast is on.

        Raises:
            InputError: if the features are of another width.
        """
        self._check_width(features)
        standardised = torch.addcmul(-self.feature_mean * self.feature_scale, features, self.feature_scale)
        projected = self.projection(standardised)
        return torch.where(missing[:, None], self.missing.to(projected.dtype), projected)

    @torch.no_grad()
    def fit_(self, items: ItemTable) -> None:
        """Take over mean and deviation of the features of warm items that have some; constant features are centred.

        Raises:
            InputError: if the features are of another width, or no warm item has any.
        """
        self._check_width(items.features)
        chosen = items.features[~(items.missing | items.cold)].double()
        if len(chosen) == 0:
            raise InputError(
                f"ItemTower.fit_ expected features of at least one item of the training histories, got {len(items)} "
                f"items, {int(items.missing.sum())} without features and {int(items.cold.sum())} cold."
            )
        deviation, mean = torch.std_mean(chosen, dim=0, correction=0)
        constant = deviation <= _CONSTANT * mean.abs()
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(torch.where(constant, 1.0, 1.0 / deviation))

    def state_key(self) -> Hashable:
        """Differs from what it was before wherever PyTorch has noticed a change of the projection."""
        tensors = chain(self.parameters(), self.buffers())
        return tuple((_version(tensor), tensor.data_ptr()) for tensor in tensors)

    def _check_width(self, features: Tensor) -> None:
        if features.shape[1:] != (self.num_features,):
            raise InputError(
                f"ItemTower expected item features [N, {self.num_features}], got {list(features.shape)}. Encode the "
                "items as those that the model was trained with, or set ItemInputConfig.num_features."
            )


def _version(tensor: Tensor) -> int | None:
    """Changes in place that PyTorch has counted; it counts none of tensors that were made in inference mode."""
    return None if tensor.is_inference() else tensor._version


class _Projection(SkipMLP):
    """A linear map plus an MLP with dropout on its hidden layers; it begins as the linear map, at the inputs' scale."""

    def __init__(self, dims: Sequence[int], dropout: float) -> None:
        super().__init__(dims)
        nn.init.normal_(self.skip.weight, std=dims[0] ** -0.5)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[N, dims[0]] to [N, dims[-1]]."""
        dropout_p, hidden = self.dropout if self.training else 0.0, x
        for linear in self.linears[:-1]:
            # ReLU and dropout may change places, and ReLU keeps nothing but its result, which the next layer keeps too.
            hidden = ops.dropout(linear(hidden), dropout_p=dropout_p).relu_()
        return self.skip(x) + self.linears[-1](hidden)
