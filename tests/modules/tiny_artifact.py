"""Real models, tokenizers and model artifacts small enough for tests."""

import torch

from data.schemas import Catalogue
from modules.artifact import load_model_artifact, save_model_artifact
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.sequential.sasrec import SASRec, SASRecConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer

RANKER_SETTINGS = {"beam_width": 5, "max_history": 4}


class FixedTokenizer:
    """What generation uses of a SemanticIdTokenizer, with given ids."""

    def __init__(self, semantic_ids, level_sizes, language="text"):
        self.semantic_ids = semantic_ids
        self.level_sizes = tuple(level_sizes)
        self.language = language
        self.available = None

    @property
    def num_items(self):
        return len(self.semantic_ids)


def tiny_model(level_sizes, seed=0, **changes):
    """A random retrieval model with large weights, so that its predictions are far from uniform."""
    sizes = {"d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_encoder_layers": 1}
    sizes |= {"num_decoder_layers": 2, "num_user_buckets": 7, "separator": True} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EncoderDecoderRetrievalModel(RetrievalModelConfig(languages={"text": tuple(level_sizes)}, **sizes))
    with torch.no_grad():
        for parameter in model.heads.parameters() if model.config.writes_codes else ():
            parameter.mul_(8.0)
    return model.eval()


def tiny_catalogue(num_items=12):
    """Items item-0, item-1, ... with titles Title 0, Title 1, ...; the last one has no title."""
    keys = [f"item-{item}" for item in range(num_items)]
    titles = [f"Title {item}" for item in range(num_items - 1)] + [""]
    return Catalogue(keys, titles, [""] * num_items)


def tiny_tokenizer(num_items=12, seed=0, **settings):
    """A tokenizer from an untrained RQ-VAE; some items collide. Settings are those of `SemanticIdTokenizer.fit`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = torch.randn(num_items, 6)
        rqvae = RqVae(RqVaeConfig(input_dim=6, embed_dim=4, hidden_dims=(8,), codebook_sizes=(5, 3)))
    description = {"feature_description": {"encoder": "file"}, "dataset_manifest_hash": "d0"}
    return SemanticIdTokenizer.fit(rqvae, features, tiny_catalogue(num_items), **description, **settings)


def save_tiny_artifact(folder, seed=0, tokenizer=None, **extra):
    """Save a model artifact and read it back."""
    tokenizer = tokenizer or tiny_tokenizer(seed=seed)
    model = tiny_model(tokenizer.level_sizes, seed=seed)
    manifest = {"dataset": {"dataset": "demo"}, "dataset_manifest_hash": "d0", "commit": "c0", **extra}
    save_model_artifact(folder, model, tokenizer, manifest, ranker_settings=RANKER_SETTINGS)
    return load_model_artifact(folder)


TINY_ITEMS = ItemInputConfig(num_features=6, hidden_dims=(8,), num_positions=4)


def tiny_items(num_items=12, seed=0):
    """Random features; item 1 has none, items 9 and up are cold."""
    features = torch.randn(num_items, 6, generator=torch.Generator().manual_seed(seed))
    missing, cold = torch.arange(num_items) == 1, torch.arange(num_items) >= 9
    return ItemTable(features.masked_fill(missing[:, None], 0.0), missing, cold)


def save_tiny_liger(folder, seed=0, settings=RANKER_SETTINGS, **changes):
    """Save a model that writes codes and has a dense head, unless `changes` of its config say other; read it back."""
    tokenizer, items = tiny_tokenizer(seed=seed), tiny_items(seed=seed)
    model = tiny_model(
        tokenizer.level_sizes, seed=seed, **{"items": TINY_ITEMS, "embedding_loss_weight": 1.0} | changes
    )
    model.fit_features_(items)
    save_model_artifact(folder, model, tokenizer, {"commit": "c0"}, ranker_settings=settings, items=items)
    return load_model_artifact(folder)


def save_tiny_sasrec(folder, num_items=12, seed=0, **manifest):
    """Save a random SASRec, whose artifact has no tokenizer, and read it back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SASRec(SASRecConfig(num_items=num_items, d_model=8, d_ff=8, num_layers=1, max_history=4))
    settings = {"max_history": 4}
    catalogue = tiny_catalogue(num_items)
    save_model_artifact(folder, model, catalogue, manifest, ranker_settings=settings, system="sasrec")
    return load_model_artifact(folder)
