import pytest
import torch

from data.schemas import InputError
from evaluation.reconstruction import reconstruct
from modules.rqvae import RqVae, RqVaeConfig


def doubling_rqvae():
    """Encoder: half of x. Decoder: twice the latent. Codebooks that a person can add up."""
    rqvae = RqVae(RqVaeConfig(input_dim=2, embed_dim=2, hidden_dims=(), codebook_sizes=(2, 2), bias=False)).eval()
    with torch.no_grad():
        rqvae.encoder.load_state_dict({name: torch.eye(2) / 2 for name in rqvae.encoder.state_dict()})
        rqvae.decoder.load_state_dict({name: torch.eye(2) * 2 for name in rqvae.decoder.state_dict()})
    codebooks = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    rqvae.codebooks = lambda: codebooks
    return rqvae


FEATURES = torch.tensor([[2.0, 0.0], [4.0, 2.0]])
CODES = torch.tensor([[0, 0], [0, 1]])


def test_errors_by_hand():
    """Latents (1, 0) and (2, 1); the codes' sums are (1, 0) and (2, 0), which decode to (2, 0) and (4, 0)."""
    found = reconstruct(doubling_rqvae(), FEATURES, CODES)
    assert found.errors.tolist() == [0.0, 4.0]
    assert found.error == 2.0
    assert found.variance == 2.0  # from the mean (3, 1)
    assert found.explained == 0.0
    assert found.unquantized == 0.0
    assert found.explained_unquantized == 1.0
    # After one level (0, 0) and (1, 1) are left, after two (0, 0) and (0, 1); the latents' mean is (1.5, 0.5).
    assert found.latent_residual == (1.0, 0.5)
    assert found.latent_variance == 0.5
    assert found.latent_explained == (-1.0, 0.0)


def test_blocks_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    rqvae = RqVae(RqVaeConfig(input_dim=6, embed_dim=3, hidden_dims=(5,), codebook_sizes=(4, 3, 2))).eval()
    features = torch.randn(63, 6) + 5
    codes = rqvae.semantic_ids(features)
    whole = reconstruct(rqvae, features, codes)
    monkeypatch.setattr("evaluation.reconstruction._BLOCK_ROWS", 10)
    parts = reconstruct(rqvae, features, codes)
    torch.testing.assert_close(parts.errors, whole.errors)
    assert parts.variance == pytest.approx(whole.variance)
    assert parts.latent_residual == pytest.approx(whole.latent_residual)
    assert whole.variance == pytest.approx(float(features.var(dim=0, unbiased=False).sum()), rel=1e-5)


def test_the_error_is_that_of_training():
    torch.manual_seed(0)
    rqvae = RqVae(RqVaeConfig(input_dim=6, embed_dim=3, hidden_dims=(5,), codebook_sizes=(4, 3))).eval()
    features = torch.randn(20, 6)
    output = rqvae(features)
    assert reconstruct(rqvae, features, output.codes).error == pytest.approx(output.reconstruction_loss.item())


def test_categorical_inputs_are_compared_as_probabilities():
    torch.manual_seed(0)
    config = RqVaeConfig(input_dim=4, embed_dim=3, hidden_dims=(), codebook_sizes=(4,), num_categorical=4)
    rqvae = RqVae(config).eval()
    assert bool((reconstruct(rqvae, torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.int64)).errors <= 4).all())


def test_constant_features_have_nothing_to_explain():
    found = reconstruct(doubling_rqvae(), torch.tensor([[1e4, 3.0]]).expand(5, 2), CODES[:1].expand(5, 2))
    assert (found.variance, found.explained) == (0.0, None)
    assert found.latent_explained == (None, None)


def test_bad_input():
    with pytest.raises(InputError, match=r"codes of 2 >= 1 items, got \[1, 2\]"):
        reconstruct(doubling_rqvae(), FEATURES, CODES[:1])
    with pytest.raises(InputError, match=r"expected x of shape"):
        reconstruct(doubling_rqvae(), FEATURES[:, :1], CODES)
