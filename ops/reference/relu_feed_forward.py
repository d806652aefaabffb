"""T5's feed-forward layer."""

from torch import Tensor

from ops.reference.dropout import dropout


def relu_feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, dropout_p: float, seed: Tensor | None = None) -> Tensor:
    """See `ops.relu_feed_forward`."""
    return dropout((x @ w_in.t()).relu(), dropout_p, seed) @ w_out.t()
