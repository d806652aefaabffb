"""A small model that reads item features, with a tokenizer and an item table, and its dense scores by brute force."""

import torch

from data.schemas import SeqBatch
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.tokenizer.sequence import SequenceTokenizer
from tests.modules.generation_fakes import random_semantic_ids
from tests.modules.tiny_artifact import FixedTokenizer, tiny_model

LEVEL_SIZES = (5, 6, 3)
NUM_FEATURES = 6
ROWS = [[0, 1, 2], [3], [], [4, 5, 6, 7, 7]]
HISTORIES = SeqBatch.from_lists(ROWS)


def item_table(num_items=40, seed=0, cold=None):
    """Random features; every ninth item has none, every fifth one is cold unless flags say otherwise."""
    generator = torch.Generator().manual_seed(seed)
    missing = torch.arange(num_items) % 9 == 4
    features = torch.randn(num_items, NUM_FEATURES, generator=generator).masked_fill(missing[:, None], 0.0)
    return ItemTable(features, missing, torch.arange(num_items) % 5 == 0 if cold is None else cold)


def tokenizer_of(num_items=40, seed=0, available=None):
    tokenizer = FixedTokenizer(random_semantic_ids(num_items, list(LEVEL_SIZES), seed), LEVEL_SIZES)
    tokenizer.available = available
    return tokenizer


def liger_model(seed=0, **changes):
    items = ItemInputConfig(num_features=NUM_FEATURES, hidden_dims=(8,))
    return tiny_model(LEVEL_SIZES, seed=seed, **{"items": items, "embedding_loss_weight": 1.0, **changes})


def liger_parts(num_items=40, seed=0, cold=None, available=None):
    """Model, tokenizer and items."""
    return liger_model(seed), tokenizer_of(num_items, seed, available), item_table(num_items, seed, cold)


@torch.no_grad()
def cosines(model, tokenizer, items, histories=HISTORIES):
    """[B, N] fp64: the model's dense scores, from everything at once."""
    model.eval()
    vectors = model.project_items(items)
    tokens = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary)(histories)
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return model.queries(tokens, vectors).double() @ unit.T


def assert_ranked_by(scores, item_ids, found, candidates, k):
    """A list is the best k of each row's candidates, up to rounding, which may part or swap near ties.

    Args:
        scores: [B, N] of every item.
        item_ids: [B, k] of the list, as are found, its scores.
        candidates: [B, N] bool.
    """
    expected = scores.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True).values[:, :k]
    expected = torch.nn.functional.pad(expected, (0, k - expected.shape[1]), value=-torch.inf)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    listed = item_ids >= 0
    assert torch.equal(listed.sum(1), candidates.sum(1).clamp(max=k))
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in item_ids)
    assert candidates.gather(1, item_ids.clamp(min=0))[listed].all()
    own = scores.gather(1, item_ids.clamp(min=0))
    torch.testing.assert_close(found.double()[listed], own[listed], rtol=1e-5, atol=1e-5)
