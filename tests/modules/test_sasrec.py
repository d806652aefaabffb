from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import InputError, SeqBatch
from modules.sequential.sasrec import SASRec, SASRecConfig

ROWS = [[3, 1, 4, 1, 5], [], [9, 2, 6], [8]]
SIZES = {"num_items": 10, "d_model": 8, "num_heads": 2, "d_ff": 12, "max_history": 6}

both_norms = pytest.mark.parametrize("norm", ["pre", "post"])


def model(**changes) -> SASRec:
    """In fp64, with norms that are not plain, as after training."""
    torch.manual_seed(0)
    sasrec = SASRecConfig(**{**SIZES, **changes}).build()
    for name, parameter in sasrec.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return sasrec.double().eval()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (len(weight),), weight, eps=1e-6)


def by_hand(sasrec: SASRec, items: list[int], norm: str) -> Tensor:
    """[n, D] states of one row, layer by layer as the paper has it."""
    width, heads = sasrec.config.d_model, sasrec.config.num_heads
    n = len(items)
    x = sasrec.items[items] * width**0.5 + sasrec.positions[:n]
    if norm == "post":
        x = normed(x, sasrec.input_norm.weight)
    weight = sasrec.input_norm.weight  # of the norm in front of the next layer, where norms are in front
    for block in sasrec.blocks:
        attention, feed_forward = block.attention, block.feed_forward

        def attend(y, attention=attention):
            q, k, v = (part.view(n, heads, -1).transpose(0, 1) for part in attention.qkv(y).chunk(3, dim=1))
            return attention.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1))

        def transform(y, feed_forward=feed_forward):
            return F.linear(F.relu(F.linear(y, feed_forward.w_in)), feed_forward.w_out)

        for layer, following in ((attend, block.attention_norm), (transform, block.feed_forward_norm)):
            if norm == "pre":
                x = x + layer(normed(x, weight))
                weight = following.weight
            else:
                x = normed(x + layer(x), following.weight)
    return normed(x, weight) if norm == "pre" else x


@both_norms
def test_packed_rows_equal_each_row_by_hand(norm):
    sasrec = model(norm=norm)
    expected = torch.cat([by_hand(sasrec, row, norm) for row in ROWS if row])
    torch.testing.assert_close(sasrec.encode(SeqBatch.from_lists(ROWS)), expected)


@both_norms
def test_a_position_sees_what_precedes_it_and_nothing_else(norm):
    sasrec = model(norm=norm)
    whole = sasrec.encode(SeqBatch.from_lists([ROWS[0]]))
    prefixes = sasrec.queries(SeqBatch.from_lists([ROWS[0][:end] for end in range(1, 6)]))
    torch.testing.assert_close(prefixes, whole)
    order_matters = sasrec.queries(SeqBatch.from_lists([[1, 3, 4, 1, 5]]))
    assert (order_matters - whole[-1]).abs().max() > 1e-3


def test_dropout_is_for_training_alone():
    sasrec = model(dropout=0.5)
    batch = SeqBatch.from_lists(ROWS)
    torch.testing.assert_close(sasrec.encode(batch), sasrec.encode(batch), rtol=0, atol=0)
    sasrec.train()
    assert (sasrec.encode(batch) - sasrec.encode(batch)).abs().max() > 0.1


def test_it_learns_what_follows_what():
    torch.manual_seed(0)
    sasrec = SASRecConfig(**SIZES, dropout=0.0).build()
    rows = [[(start + step) % 10 for step in range(5)] for start in range(10)]
    targets = torch.tensor([(row[-1] + 1) % 10 for row in rows])
    batch = replace(SeqBatch.from_lists(rows), targets=targets)
    optimizer = torch.optim.Adam(sasrec.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        sasrec(batch)["loss"].backward()
        optimizer.step()
    sasrec.eval()
    assert (sasrec.queries(batch) @ sasrec.item_vectors().T).argmax(1).tolist() == targets.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "d_model as a multiple of num_heads, got 8 and 3"),
        ({"norm": "both"}, "norm to be 'pre' or 'post', got 'both'"),
        ({"num_layers": 0}, "SASRecConfig expected num_layers of at least 1, got 0"),
    ],
)
def test_sizes_that_no_model_can_have(change, message):
    with pytest.raises(InputError, match=message):
        SASRecConfig(**{**SIZES, **change})
