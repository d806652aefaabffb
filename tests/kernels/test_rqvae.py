import pytest
import torch

import ops
from modules.estimators import QuantizeMode
from modules.kmeans import kmeans
from modules.rqvae import RqVae, RqVaeConfig
from tests.kernels.harness import randn


@pytest.mark.parametrize("mode", QuantizeMode)
@pytest.mark.parametrize("settings", [{}, {"sim_vq": True, "codebook_normalize": True}], ids=["plain", "sim_vq"])
def test_a_training_step_equals_that_of_the_reference(device, mode, settings):
    torch.manual_seed(0)
    config = RqVaeConfig(input_dim=12, embed_dim=5, hidden_dims=(9,), codebook_sizes=(20, 7), mode=mode, **settings)
    model, x = RqVae(config).to(device), randn(37, 12).to(device)
    found = []
    for backend in ("triton", "torch"):
        model.zero_grad()
        torch.manual_seed(1)
        with ops.use_backend(backend):
            output = model(x)
            output.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((output.codes, output.loss.detach(), gradients))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_kmeans_equals_that_of_the_reference(device):
    x = randn(200, 4).to(device)
    with ops.use_backend("torch"):
        expected = kmeans(x, 12, num_iterations=5)
    torch.testing.assert_close(kmeans(x, 12, num_iterations=5), expected)
