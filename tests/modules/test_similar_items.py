import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modules.similar_items as module
from data.schemas import ItemFilter
from modules.rqvae import RqVae, RqVaeConfig
from modules.similar_items import similar_items
from tests.item_filters import filter_of


class WithCodes:
    """What is used of a tokenizer: codes, and an RQ-VAE with given codebooks."""

    def __init__(self, codes, codebooks):
        sizes = tuple(len(codebook) for codebook in codebooks)
        self.rqvae = RqVae(
            RqVaeConfig(input_dim=3, embed_dim=codebooks[0].shape[1], hidden_dims=(2,), codebook_sizes=sizes)
        )
        for quantizer, codebook in zip(self.rqvae.quantizers, codebooks, strict=True):
            quantizer.weight.data.copy_(codebook)
        self.codes = codes

    def quantizer(self, purpose):
        return self.rqvae


def anything(num_rows):
    return ItemFilter.from_lists([[] for _ in range(num_rows)])


def test_a_catalogue_worked_out_by_hand():
    codebooks = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])]
    # Vectors (1,0), (2,0), (0,0), (0,1), (1,1), (-1,1).
    tokenizer = WithCodes(torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]), codebooks)
    item_ids, scores = similar_items(tokenizer, [0, 2], 6, anything(2))
    assert item_ids.tolist() == [[0, 1, 4, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    half = 0.5**0.5
    torch.testing.assert_close(scores, torch.tensor([[1, 1, half, 0, 0, -half], [0, 0, 0, 0, 0, 0]]))


def by_definition(tokenizer, item_ids, k, flags):
    codes = tokenizer.codes
    books = [codebook.detach().double() for codebook in tokenizer.rqvae.codebooks()]
    vectors = sum(book[column] for book, column in zip(books, codes.T, strict=True))
    cosines = torch.nn.functional.cosine_similarity(vectors[item_ids][:, None], vectors[None], dim=2)
    cosines = torch.where(flags, cosines, -torch.inf)
    scores, order = cosines.sort(dim=1, descending=True, stable=True)
    return order[:, :k], scores[:, :k].float()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), num_items=st.integers(1, 60), k=st.integers(1, 12), per_row=st.booleans())
def test_equals_the_definition_in_blocks_of_any_size_with_ties_by_item_id(seed, num_items, k, per_row):
    generator = torch.Generator().manual_seed(seed)
    books = [torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator)]
    codes = torch.stack([torch.randint(len(book), (num_items,), generator=generator) for book in books], dim=1)
    tokenizer, k = WithCodes(codes, books), min(k, num_items)
    queries = torch.randint(num_items, (7,), generator=generator).tolist()
    flags = torch.rand(7 if per_row else 1, num_items, generator=generator) < 0.6
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_BLOCK_CELLS", 24)
        patched.setattr(module, "_BLOCK_QUERIES", 3)
        item_ids, scores = similar_items(tokenizer, queries, k, filter_of(flags if per_row else flags[0], 7))
    expected_ids, expected = by_definition(tokenizer, queries, k, flags)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(item_ids == -1, expected == -torch.inf)
    for row, (ids, values) in enumerate(zip(item_ids.tolist(), scores.tolist(), strict=True)):
        places = list(zip([-value for value in values], ids, strict=True))
        listed = [place for place in places if place[1] >= 0]
        assert listed == sorted(listed)  # equal scores by item id, and items of equal codes have equal scores
        assert len({item for _, item in listed}) == len(listed)
        same = {tuple(codes[item].tolist()): values[ids.index(item)] for _, item in listed}
        assert all(values[ids.index(item)] == same[tuple(codes[item].tolist())] for _, item in listed)
        assert set(ids) >= {item for item, value in zip(expected_ids[row].tolist(), expected[row], strict=True)
                            if value > expected[row, -1] + 1e-5}  # fmt: skip


def test_no_queries():
    tokenizer = WithCodes(torch.tensor([[0]]), [torch.ones(1, 2)])
    item_ids, scores = similar_items(tokenizer, [], 1, anything(0))
    assert item_ids.shape == scores.shape == (0, 1)
