"""The best items of score rows, in a definite order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import NO_ITEM, InputError


def top_items(
    scores: Tensor, k: int, allowed: Tensor | None = None, *, ranker: str = "top_items"
) -> tuple[Tensor, Tensor]:
    """The k best items per row; ties go to the lowest item id, unlike `torch.topk`, which leaves them open.

    Args:
        scores: [B, N] float; an item with score -inf is never listed.
        k: length of the lists, may exceed N.
        allowed: bool [N] or [B, N]; None allows all.
        ranker: named in errors.

    Returns:
        [B, k] int64 item ids and [B, k] float32 scores, padded with -1 and -inf.

    Raises:
        InputError: if a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise nan_scores_error(ranker)
    scores = scores.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    width = min(k, scores.shape[1])
    item_ids = _top_columns(scores, width).sort(dim=1).values
    values, order = scores.gather(1, item_ids).sort(dim=1, descending=True, stable=True)
    item_ids = item_ids.gather(1, order).masked_fill(values == -torch.inf, NO_ITEM)
    padding = (0, k - width)
    return F.pad(item_ids, padding, value=NO_ITEM), F.pad(values, padding, value=-torch.inf)


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """[B, k] columns of the k highest scores in any order, the lowest columns where the k-th score ties."""
    values, columns = scores.topk(k, dim=1)
    if k == 0:
        return columns
    kth = values[:, -1:]
    open_choice = ((scores >= kth).sum(dim=1) > k) & (kth[:, 0] > -torch.inf)
    if bool(open_choice.any()):
        scores, kth = scores[open_choice], kth[open_choice]
        above, tied = scores > kth, scores == kth
        places = k - above.sum(dim=1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(dim=1) <= places))
        columns[open_choice] = chosen.nonzero()[:, 1].view(-1, k)
    return columns


def nan_scores_error(ranker: str) -> InputError:
    """The error for a ranker whose scores are not numbers."""
    return InputError(
        f"ranker {ranker!r} gave NaN scores, which have no order (every comparison with NaN is false). "
        "Its weights are probably NaN: look for the step where the loss became NaN, and train again with a lower "
        "learning rate or mixed_precision = 'no'."
    )
