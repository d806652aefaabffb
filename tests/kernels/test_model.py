"""The whole models on kernels do what they do in PyTorch: they learn the same weights and find the same items."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from data.schemas import SeqBatch
from modules.generation.beam import beam_search
from modules.generation.trie import PrefixTrie
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.sequence import SequenceTokenizer
from ops.triton.library import NAMESPACE
from tests.item_filters import filter_of
from tests.kernels.gpu_paths import as_on_a_gpu
from tests.kernels.harness import randn

STEPS = 3
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Of losses and weights after some steps of AdamW, which enlarges differences of tiny gradients: their sign counts."""

CONFIG = RetrievalModelConfig(
    languages={"text": (5, 4, 3)},
    d_model=16,
    num_heads=2,
    head_dim=16,
    d_ff=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout=0.0,
    num_user_buckets=3,
    relative_buckets=8,
    relative_max_distance=16,
)
ITEMS = ItemInputConfig(
    num_features=6, hidden_dims=(8,), num_positions=6, projection_dropout=0.0, input_dropout=0.0, temperature=0.5
)
HISTORIES = [[3, 1, 4, 1, 5], [], [9], [2, 6, 5, 3, 5, 8]]


def model_and_tokenizer(device, **changes):
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(replace(CONFIG, **changes))
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.bias.table)
    return model.to(device), SequenceTokenizer(semantic_ids(), model.vocabulary).to(device)


def semantic_ids():
    """Twelve items."""
    items = torch.arange(12)
    return torch.stack([items % 5, items % 4, items % 3], dim=1)


def batch_of(device, histories=HISTORIES):
    targets, users = torch.arange(len(histories)) % 12, torch.arange(len(histories))
    return replace(SeqBatch.from_lists(histories), targets=targets, user_hashes=users).to(device)


def trained(model, losses):
    """Losses of a few steps, and the weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    values = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = losses(step)
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values), dict(model.named_parameters())


def learn(device, backend):
    model, tokenize = model_and_tokenizer(device)
    with ops.use_backend(backend):
        return trained(model, lambda step: model(tokenize(batch_of(device, HISTORIES[step:])))["loss"])


def learn_liger(device, backend):
    """LIGER, whose items 10 and 11 are cold and lack features."""
    model, tokenize = model_and_tokenizer(device, items=ITEMS, embedding_loss_weight=1.0)
    rare = torch.arange(12) >= 10
    items = ItemTable(randn(12, 6).masked_fill(rare[:, None], 0.0), rare, rare)
    model.fit_features_(items)
    items = items.to(device)
    with ops.use_backend(backend):
        return trained(model, lambda step: model(tokenize(batch_of(device, HISTORIES[step:])), items)["loss"])


@pytest.mark.parametrize(("learn", "paths"), [(learn, nullcontext), (learn, as_on_a_gpu), (learn_liger, nullcontext)])
def test_training_equals_that_of_the_reference(device, learn, paths):
    expected_losses, expected = learn(device, "torch")
    with paths():
        losses, weights = learn(device, "triton")
    torch.testing.assert_close(losses, expected_losses, **TOLERANCE)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert losses[0] != losses[1]


@pytest.mark.parametrize("paths", [nullcontext, as_on_a_gpu])
def test_a_batch_of_fixed_capacity_has_the_same_loss_and_gradients(device, paths):
    model, tokenize = model_and_tokenizer(device)
    batch = batch_of(device)
    filled = batch.to_capacity(num_rows=6, num_items=20)
    with paths():
        losses = [model(tokenize(one))["loss"] for one in (batch, filled)]
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
    torch.testing.assert_close(gradients[1], gradients[0], **TOLERANCE)


def test_dropout_changes_with_every_step_and_not_with_the_seed_repeated(device):
    model, tokenize = model_and_tokenizer(device, dropout=0.3)
    tokens, losses = tokenize(batch_of(device)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(tokens)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("paths", [nullcontext, as_on_a_gpu])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("normalize", ["level", "children"])
def test_generation_finds_the_same_items(device, paths, allowed, normalize):
    model, tokenize = model_and_tokenizer(device)
    trie = PrefixTrie.from_semantic_ids(semantic_ids()).to(device)
    flags = torch.rand(len(HISTORIES), 12, generator=torch.Generator().manual_seed(1)) < 0.6
    item_filter = filter_of(flags, len(HISTORIES)).to(device) if allowed else None
    found = []
    for backend in ("torch", "triton"):
        with ops.use_backend(backend), paths():
            tokens = replace(tokenize(batch_of(device)), target_codes=None)
            found.append(beam_search(model.eval(), tokens, trie, 4, item_filter, normalize))
    (expected_ids, expected_scores), (item_ids, scores) = found
    assert item_ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(scores, expected_scores, **TOLERANCE)


def test_an_rqvae_learns_the_same(device):
    def learn(backend):
        torch.manual_seed(0)
        model = RqVae(RqVaeConfig(input_dim=12, embed_dim=5, hidden_dims=(9,), codebook_sizes=(20, 7))).to(device)
        with ops.use_backend(backend):
            return trained(model, lambda step: model(randn(37, 12, seed=step).to(device)).loss)

    (expected_losses, expected), (losses, weights) = learn("torch"), learn("triton")
    torch.testing.assert_close(losses, expected_losses, **TOLERANCE)
    torch.testing.assert_close(weights, expected, **TOLERANCE)


class Names(TorchDispatchMode):
    """Collects the names of the library ops that run, without those of their gradients."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == NAMESPACE:
            self.found.add(function.name().partition("::")[2].removesuffix("_backward"))
        return function(*arguments, **(options or {}))


def test_models_run_on_kernels(device):
    """Everything but the loss of an RQ-VAE and products; the ops that are missing here are for other models."""
    model, tokenize = model_and_tokenizer(device, dropout=0.1)
    trie = PrefixTrie.from_semantic_ids(semantic_ids()).to(device)
    with Names() as names:
        model(tokenize(batch_of(device)))["loss"].backward()
        beam_search(model.eval(), tokenize(batch_of(device)), trie, 4)
        rqvae = RqVae(RqVaeConfig(input_dim=12, embed_dim=5, hidden_dims=(9,), codebook_sizes=(20, 7))).to(device)
        rqvae.initialize_codebooks_(randn(37, 12).to(device))
    assert names.found == {
        "add_rms_norm",
        "beam_cross_attention",
        "beam_self_attention",
        "codebook_stats",
        "cross_entropy_small_vocab",
        "dropout",
        "jagged_attention",
        "jagged_concat",
        "relu_feed_forward",
        "residual_quantize",
        "semantic_id_embedding",
        "trie_topk_step",
    }
