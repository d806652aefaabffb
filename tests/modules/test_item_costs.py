import numpy as np
import pytest
import torch

from modules.quantize import Distance
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.item_costs import ItemCosts

SIZES = (5, 4, 6)


def make_rqvae(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RqVae(RqVaeConfig(input_dim=6, embed_dim=3, hidden_dims=(8,), codebook_sizes=SIZES, **settings)).eval()


def make_features(num_items=3000):
    return torch.randn(num_items, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("distance", Distance)
def test_costs_are_those_of_what_the_codes_before_leave(distance):
    rqvae, features = make_rqvae(distance=distance), make_features()
    codes = rqvae.semantic_ids(features)
    item_ids = torch.tensor([2999, 7, 1024, 0])
    costs = ItemCosts(rqvae, features, item_ids.sort().values)
    books = [book.detach() for book in rqvae.codebooks()]
    residual = rqvae.encode(features[item_ids]).detach()
    for level, book in enumerate(books):
        found = costs(item_ids, codes[item_ids], level)
        if distance is Distance.COSINE:
            expected = -torch.nn.functional.cosine_similarity(residual[:, None], book[None], dim=2)
        else:
            expected = torch.cdist(residual, book).square()
        torch.testing.assert_close(found, expected)
        assert torch.equal(found.argmin(dim=1), codes[item_ids, level])
        residual = residual - book[codes[item_ids, level]]


def test_features_are_read_in_slices_and_only_where_items_are_wanted():
    features, read = make_features(), []

    class Slices:
        shape = (3000, 6)

        def __getitem__(self, rows):
            read.append((rows.start, rows.stop))
            return features.numpy()[rows]

    rqvae, wanted = make_rqvae(), torch.tensor([3, 4, 2500, 2999])
    codes = rqvae.semantic_ids(features)
    found = ItemCosts(rqvae, Slices(), wanted)(wanted, codes[wanted], 2)
    assert read == [(0, 1024), (2048, 3072)]
    assert torch.equal(found, ItemCosts(rqvae, features, wanted)(wanted, codes[wanted], 2))


@pytest.mark.parametrize("num_wanted", [0, 1, 63, 1024, 1025, 2999])
def test_an_item_costs_the_same_among_any_others(num_wanted):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rqvae = RqVae(RqVaeConfig(input_dim=64, hidden_dims=(96, 48), codebook_sizes=(16, 16, 64))).eval()
    features = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    codes = rqvae.semantic_ids(features)
    wanted = torch.randperm(3000, generator=torch.Generator().manual_seed(2))[:num_wanted]
    every = torch.arange(3000)
    whole = ItemCosts(rqvae, features, every)(every, codes, 2)
    some = ItemCosts(rqvae, features, wanted.sort().values)
    assert torch.equal(some(wanted, codes[wanted], 2), whole[wanted])  # blocks of one shape round alike


def test_half_precision_features_and_encoders(tmp_path):
    np.save(tmp_path / "features.npy", make_features().half().numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    rqvae, every = make_rqvae(), torch.arange(3000)
    codes = rqvae.semantic_ids(make_features())
    exact = ItemCosts(rqvae, make_features(), every)(every, codes, 2)
    from_map = ItemCosts(rqvae, mapped, every)(every, codes, 2)
    half = ItemCosts(rqvae, mapped, every, encoder_dtype=torch.bfloat16)(every, codes, 2)
    torch.testing.assert_close(from_map, exact, atol=0.02, rtol=0.02)
    assert not torch.equal(half, from_map)
    torch.testing.assert_close(half, from_map, atol=0.1, rtol=0.1)
    assert half.dtype == torch.float32
