"""What rankers of every kind do with the histories and filters that they are given."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from data.schemas import InputError, ItemFilter, SeqBatch
from modules.model import EncoderDecoderRetrievalModel
from modules.tokenizer.tokenizer import SemanticIdTokenizer


def check_settings(owner: str, **settings: int) -> None:
    """InputError if a number is below 1."""
    for name, value in settings.items():
        if value < 1:
            raise InputError(f"{owner} expected {name} of at least 1, got {value}.")


def check_codes(owner: str, model: EncoderDecoderRetrievalModel, tokenizer: SemanticIdTokenizer) -> None:
    """InputError if the tokenizer's codes are not those that the model writes."""
    expected = model.config.languages[model.language]
    if (model.language, expected) != (tokenizer.language, tokenizer.level_sizes):
        raise InputError(
            f"{owner} expected a tokenizer with {model.language!r} codes of sizes {expected}, which the model "
            f"writes; got {tokenizer.language!r} codes of sizes {tokenizer.level_sizes}. "
            "Use the tokenizer that the model was trained with."
        )


def check_filter(allowed: ItemFilter, *, num_rows: int, num_items: int) -> None:
    """Parts of a filter of more rows would fit, and so would flags of another catalogue: ValueError."""
    num_flags = num_items if allowed.allowed is None else len(allowed.allowed)
    if (len(allowed), num_flags) != (num_rows, num_items):
        raise ValueError(
            f"rank expected a filter of {num_rows} rows and, if any, flags of {num_items} items, "
            f"got {len(allowed)} rows and {num_flags} flags."
        )


def last_items(histories: SeqBatch, max_history: int) -> SeqBatch:
    """The batch with only the last `max_history` items of every row.

    On a GPU, whose host would have to wait for their number, the batch keeps a tail of items that belong to no row.
    """
    if histories.max_len <= max_history or len(histories) == 0:
        return histories
    ends = histories.offsets[1:].long()
    offsets = torch.nn.functional.pad(histories.offsets.diff().clamp(max=max_history).cumsum(0), (1, 0))
    num_items = min(len(histories.item_ids), len(histories) * max_history)
    if _knows_values(offsets):
        num_items = int(offsets[-1])
    places = torch.arange(num_items, device=offsets.device)
    rows = torch.bucketize(places, offsets[1:], right=True).clamp(max=len(histories) - 1)
    positions = places + (ends - offsets[1:])[rows]
    return replace(
        histories,
        item_ids=histories.item_ids[positions.clamp(max=len(histories.item_ids) - 1)],
        offsets=offsets.to(torch.int32),
        max_len=max_history,
    )


def _knows_values(tensor: torch.Tensor) -> bool:
    """Whether the host reads a tensor without waiting."""
    return tensor.device.type == "cpu"


def parts_of(histories: SeqBatch, num_rows: int) -> Iterator[tuple[slice, SeqBatch]]:
    """The batch in parts of at most `num_rows` rows, each with the rows that it holds.

    The host waits for a GPU only where histories that lie there are really parted.
    """
    if 0 < len(histories) <= num_rows:
        yield slice(0, len(histories)), histories
        return
    bounds = histories.offsets.tolist()
    for begin in range(0, len(histories), num_rows):
        rows = slice(begin, min(begin + num_rows, len(histories)))
        part = replace(
            histories,
            item_ids=histories.item_ids[bounds[rows.start] : bounds[rows.stop]],
            offsets=histories.offsets[rows.start : rows.stop + 1] - bounds[rows.start],
            user_hashes=histories.user_hashes[rows],
            targets=None if histories.targets is None else histories.targets[rows],
        )
        yield rows, part


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is off meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
