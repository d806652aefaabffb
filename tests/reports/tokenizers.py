"""Tokenizers and features for tests of the report."""

import torch

from data.schemas import Catalogue
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer

WIDTH = 6


def clustered_features(num_items=240, num_groups=8, seed=0):
    """[N, 6] rows around a few directions; item i is of group i % num_groups."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_groups, WIDTH, generator=generator)
    return centres[torch.arange(num_items) % num_groups] + 0.2 * torch.randn(num_items, WIDTH, generator=generator)


def catalogue_of(num_items, *, titles=None, categories=None):
    keys = [f"key-{item}" for item in range(num_items)]
    return Catalogue(keys, list(titles or [""] * num_items), list(categories or [""] * num_items))


def residual_kmeans_rqvae(features, sizes=(8, 8, 8)):
    """Encoder and decoder do nothing; codebooks by k-means on the features."""
    config = RqVaeConfig(input_dim=WIDTH, embed_dim=WIDTH, hidden_dims=(), codebook_sizes=sizes, bias=False)
    rqvae = RqVae(config).eval()
    with torch.no_grad():
        for coder in (rqvae.encoder, rqvae.decoder):
            coder.load_state_dict({name: torch.eye(WIDTH) for name in coder.state_dict()})
    rqvae.initialize_codebooks_(features, seed=0)
    return rqvae


def fitted(features, *, sizes=(8, 8, 8), policy=CollisionPolicy.DEDUP_CODE, rqvae=None, **columns):
    """A tokenizer of features."""
    return SemanticIdTokenizer.fit(
        rqvae or residual_kmeans_rqvae(features, sizes),
        features,
        catalogue_of(len(features), **columns),
        feature_description={"encoder": "file"},
        dataset_manifest_hash="d0",
        collisions=policy,
    )
