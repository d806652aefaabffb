"""Whole models on a GPU learn what they learn on a CPU, and find the same items."""

import pytest
import torch

import ops
from modules.generation.beam import beam_search
from modules.generation.trie import PrefixTrie
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.sequence import SequenceTokenizer
from tests.kernels.shipped import NUM_ITEMS, histories, semantic_ids

STEPS = 20
LOSS_TOLERANCE = 1e-3
"""Relative, of every loss of the curve: rounding differs, and AdamW lets small gradients count as much as large."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def retrieval_model(device, num_layers=1):
    torch.manual_seed(0)
    config = RetrievalModelConfig(
        languages={"text": (256,) * 4},
        dropout=0.0,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        num_user_buckets=50,
    )
    model = EncoderDecoderRetrievalModel(config)
    return model.to(device), SequenceTokenizer(semantic_ids(), model.vocabulary).to(device)


def loss_curve(device, backend="auto", *, steps=STEPS, num_rows=32, dtype=torch.float32):
    """Losses of a model without dropout on changing rows."""
    model, tokenize = retrieval_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)
    losses = []
    with ops.use_backend(backend):
        for step in range(steps):
            batch = histories(num_rows + step)
            with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(tokenize(batch.to(device)))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).cpu()


def rqvae_curve(device, backend="auto", *, steps=STEPS // 2):
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=96)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    losses = []
    with ops.use_backend(backend):
        for step in range(steps):
            x = torch.randn(512, 96, generator=torch.Generator().manual_seed(step)).to(device)
            loss = model(x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).cpu()


def found_items(device, backend="auto", *, num_rows=64):
    model, tokenize = retrieval_model(device)
    trie = PrefixTrie.from_semantic_ids(semantic_ids()).to(device)
    with ops.use_backend(backend):
        item_ids, scores = beam_search(model.eval(), tokenize(histories(num_rows).to(device)), trie, 20)
    return item_ids.cpu(), scores.cpu()


@pytest.mark.slow
@pytest.mark.parametrize("curve", [loss_curve, rqvae_curve])
def test_loss_curve_equals_that_of_a_cpu(curve):
    expected = curve("cpu")
    torch.testing.assert_close(curve("cuda"), expected, rtol=LOSS_TOLERANCE, atol=0)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_curve_in_half_precision(dtype):
    """Within two percent of fp32; without a loss scale fp16 loses small gradients, not the first losses."""
    expected = loss_curve("cuda", steps=5)
    torch.testing.assert_close(loss_curve("cuda", steps=5, dtype=dtype), expected, rtol=0.02, atol=0)


def test_training_twice_gives_the_same_bits():
    assert torch.equal(loss_curve("cuda"), loss_curve("cuda"))


def test_search_finds_the_items_that_a_cpu_finds():
    """Scores agree in rank order; items may change places where scores are equal to rounding."""
    (expected_ids, expected_scores), (item_ids, scores) = found_items("cpu"), found_items("cuda")
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)
    assert (item_ids == expected_ids).float().mean() > 0.99
    assert item_ids.max() < NUM_ITEMS
