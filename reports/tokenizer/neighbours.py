"""Neighbours of some items twice: by their features, and by their ids."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.semantic_ids import nearest_by_features, shared_prefix_lengths
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.tokenizer.measures import FeatureMeasures

NUM_SAMPLES = 10
NUM_NEIGHBOURS = 8


@dataclass(frozen=True)
class Neighbour:
    """An item near another: how many first codes they share, and the cosine of their features."""

    item_id: int
    num_shared: int
    cosine: float


@dataclass(frozen=True)
class SampleItem:
    """An item and its neighbours, nearest first."""

    item_id: int
    by_features: tuple[Neighbour, ...]
    by_ids: tuple[Neighbour, ...]


def sample_items(tokenizer: SemanticIdTokenizer, features: FeatureMeasures, *, seed: int) -> list[SampleItem]:
    """Some random items with their neighbours among the items whose features were read.

    By ids those are nearest that share the most first codes; among equals those whose codes' vectors add up to nearly
    the same, or, where no quantizer has vectors, the smaller item id.

    Args:
        tokenizer: of the items.
        features: of those that were read.
        seed: of the choice.
    """
    count = len(features.rows)
    if count < 2:
        return []
    k = min(NUM_NEIGHBOURS, count - 1)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:NUM_SAMPLES]
    codes = tokenizer.codes[features.rows]
    near = nearest_by_features(features.values, chosen, k)[0]
    vectors = _vectors(tokenizer, codes)
    found = []
    for row, by_features in zip(chosen.tolist(), near, strict=True):
        shared = shared_prefix_lengths(codes, codes[row : row + 1])[0]
        by_ids = _nearest_by_ids(row, shared, vectors, k)
        found.append(
            SampleItem(
                int(features.rows[row]),
                _neighbours(features, row, by_features, shared),
                _neighbours(features, row, by_ids, shared),
            )
        )
    return found


def _nearest_by_ids(row: int, shared: Tensor, vectors: Tensor | None, k: int) -> Tensor:
    """[k] rows other than the row itself."""
    distance = torch.zeros(len(shared)) if vectors is None else (vectors - vectors[row]).square().sum(dim=1)
    order = distance.argsort(stable=True)
    order = order[shared[order].argsort(descending=True, stable=True)]
    return order[order != row][:k]


def _neighbours(features: FeatureMeasures, row: int, near: Tensor, shared: Tensor) -> tuple[Neighbour, ...]:
    cosines = F.cosine_similarity(features.values[near], features.values[row : row + 1])
    return tuple(
        Neighbour(int(features.rows[other]), int(shared[other]), float(cosine))
        for other, cosine in zip(near.tolist(), cosines, strict=True)
    )


def _vectors(tokenizer: SemanticIdTokenizer, codes: Tensor) -> Tensor | None:
    """[S, embed_dim] sums of the codes' vectors."""
    if tokenizer.rqvae is None:
        return None
    device = next(tokenizer.rqvae.parameters()).device
    return tokenizer.rqvae.embed(codes.to(device)).detach().cpu()
