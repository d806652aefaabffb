"""The multi-layer perceptron that encodes and decodes item features."""

import itertools
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from data.schemas import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class MLP(nn.Module):
    """Linear layers with an activation between them, none after the last.

    Args:
        dims: widths from input to output, at least two.
        activation: a key of ACTIVATIONS.
        bias: whether the linear layers have a bias.

    Raises:
        InputError: if the activation is unknown.
    """

    def __init__(self, dims: Sequence[int], *, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"unknown activation {activation!r}; valid activations: {', '.join(ACTIVATIONS)}.")
        linears = [nn.Linear(before, after, bias=bias) for before, after in itertools.pairwise(dims)]
        for linear in linears:
            # Keeps the scale of the features through the layers, so that codes and latents start at one scale.
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            if bias:
                nn.init.zeros_(linear.bias)
        self.linears = nn.ModuleList(linears)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """[B, dims[0]] to [B, dims[-1]]."""
        for linear in self.linears[:-1]:
            x = self.activation(linear(x))
        return self.linears[-1](x)


class SkipMLP(MLP):
    """A linear map plus an MLP whose last layer is zero at first, so that it begins as the linear map.

    Args:
        dims: as of the MLP.
        activation: a key of ACTIVATIONS.
        bias: whether the linear layers have a bias.
    """

    def __init__(self, dims: Sequence[int], *, activation: str = "relu", bias: bool = True) -> None:
        super().__init__(dims, activation=activation, bias=bias)
        nn.init.zeros_(cast(nn.Linear, self.linears[-1]).weight)
        self.skip = nn.Linear(dims[0], dims[-1], bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dims[0]] to [B, dims[-1]]."""
        return self.skip(x) + super().forward(x)
