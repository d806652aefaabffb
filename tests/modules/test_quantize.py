import math

import pytest
import torch

from modules.quantize import QuantizeMode, Quantizer, gumbel_softmax_embedding, rotation_trick, straight_through

CODEBOOK = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])


def quantizer(mode=QuantizeMode.STRAIGHT_THROUGH, weight=CODEBOOK, **settings):
    module = Quantizer(len(weight), weight.shape[1], mode=mode, **settings)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x)


@pytest.mark.parametrize("mode", QuantizeMode)
def test_evaluation_takes_the_nearest_code_in_every_mode(mode):
    module = quantizer(mode).eval()
    embedding, codes = module(torch.tensor([[1.9, 0.3], [0.4, 1.2]]))
    assert codes.tolist() == [1, 2]
    assert embedding.tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_straight_through_has_the_value_of_the_target_and_the_gradient_of_x():
    x, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[5.0, 3.0]])
    assert straight_through(x, target).tolist() == [[5.0, 3.0]]
    torch.testing.assert_close(jacobian(lambda v: straight_through(v, target)[0], x)[:, 0], torch.eye(2))


def test_rotation_by_hand():
    # (1, 0) onto (0, 2): a quarter turn, scaled by 2.
    x, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(rotation_trick(x, target), target)
    expected = torch.tensor([[0.0, -2.0], [2.0, 0.0]])
    torch.testing.assert_close(jacobian(lambda v: rotation_trick(v, target)[0], x)[:, 0], expected)


def test_rotation_turns_only_the_plane_of_x_and_target():
    x, target = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[3.0 * math.cos(1.0), 3.0 * math.sin(1.0), 0.0]])
    matrix = jacobian(lambda v: rotation_trick(v, target)[0], x)[:, 0]
    expected = torch.tensor(
        [[math.cos(1.0), -math.sin(1.0), 0.0], [math.sin(1.0), math.cos(1.0), 0.0], [0.0, 0.0, 1.0]]
    )
    torch.testing.assert_close(matrix, expected)


def test_rotation_is_a_scaled_rotation_for_random_rows():
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 20, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(rotation_trick(x, target), target)
    for row in range(20):
        matrix = jacobian(lambda v, t=target[row]: rotation_trick(v[None], t[None])[0], x[row])
        scale = target[row].norm() / x[row].norm()
        torch.testing.assert_close(matrix @ matrix.T, scale**2 * torch.eye(6, dtype=torch.float64))
        assert torch.linalg.det(matrix) > 0
        torch.testing.assert_close(matrix @ x[row], target[row])


@pytest.mark.parametrize(
    ("x", "target"),
    [((1.0, 2.0), (-1.0, -2.0)), ((0.0, 0.0), (1.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)), ((0.0, 0.0), (0.0, 0.0))],
    ids=["opposite", "zero x", "zero target", "both zero"],
)
def test_rotation_without_a_direction_falls_back_to_straight_through(x, target):
    x, target = torch.tensor([x]), torch.tensor([target])
    assert torch.equal(rotation_trick(x, target), target)
    torch.testing.assert_close(jacobian(lambda v: rotation_trick(v, target)[0], x)[:, 0], torch.eye(2))


@pytest.mark.parametrize("epsilon", [1e-2, 2e-3, 5e-4, 1e-4, 1e-7])
def test_rotation_stays_a_rotation_near_opposite(epsilon):
    x, target = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[-1.0, epsilon, 0.0]])
    matrix = jacobian(lambda v: rotation_trick(v, target)[0], x)[:, 0]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), rtol=0.0, atol=5e-3)  # a rotation, or straight through
    assert torch.linalg.det(matrix) > 0
    torch.testing.assert_close(rotation_trick(x, target), target)


def test_gumbel_softmax_becomes_the_nearest_code_when_cold():
    residual = torch.tensor([[1.9, 0.3], [0.4, 1.2]])
    torch.manual_seed(0)
    cold = gumbel_softmax_embedding(residual, CODEBOOK, 1e-4)
    torch.testing.assert_close(cold, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))


def test_gumbel_softmax_by_hand():
    # Distances 1 and 9, unit 1 (the nearest), temperature 4: the second weight is sigmoid(-8 / 4 + g1 - g0).
    residual, codebook = torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0]])
    torch.manual_seed(3)
    noise = -torch.empty(1, 2).exponential_().log()
    torch.manual_seed(3)
    expected = 4.0 * torch.sigmoid(-8 / 4.0 + noise[0, 1] - noise[0, 0])
    torch.testing.assert_close(gumbel_softmax_embedding(residual, codebook, 4.0), expected.reshape(1, 1))


def test_gumbel_noise_does_not_depend_on_the_scale_of_features():
    residual = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    small = gumbel_softmax_embedding(residual, CODEBOOK, 0.5)
    torch.manual_seed(1)
    large = gumbel_softmax_embedding(residual * 100, CODEBOOK * 100, 0.5)
    torch.testing.assert_close(large, small * 100, rtol=1e-4, atol=1e-3)


def test_gumbel_softmax_reaches_residual_and_codebook():
    residual = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    module = quantizer(QuantizeMode.GUMBEL_SOFTMAX)
    torch.manual_seed(0)
    embedding, codes = module(residual, 0.5)
    embedding.square().sum().backward()
    assert (residual.grad.norm(dim=1) > 0).all()
    assert (module.weight.grad.norm(dim=1) > 0).all()
    assert torch.equal(codes, torch.cdist(residual, CODEBOOK).argmin(dim=1))


def test_gumbel_softmax_survives_rows_that_are_codes():
    module = quantizer(QuantizeMode.GUMBEL_SOFTMAX)
    residual = CODEBOOK.clone().requires_grad_()
    embedding, _ = module(residual, 0.1)
    embedding.sum().backward()
    assert embedding.isfinite().all()
    assert residual.grad.isfinite().all()


def test_sim_vq_learns_the_map_and_freezes_the_codes():
    module = quantizer(sim_vq=True)
    with torch.no_grad():
        module.projection.weight.copy_(torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    assert module.codebook().tolist() == [[0.0, 0.0], [0.0, 6.0], [2.0, 0.0], [2.0, 6.0]]
    embedding, codes = module(torch.tensor([[0.0, 5.0]]))
    assert codes.tolist() == [1]
    embedding.sum().backward()
    assert module.weight.grad is None
    assert module.projection.weight.grad.tolist() == [[2.0, 0.0], [2.0, 0.0]]


def test_normalised_codes_have_unit_length_and_choose_by_cosine():
    module = quantizer(weight=torch.tensor([[10.0, 0.0], [3.0, 4.0]]), normalize=True)
    torch.testing.assert_close(module.codebook(), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    _, codes = module(torch.tensor([[0.8, 0.6], [0.96, -0.28]]))
    assert codes.tolist() == [1, 0]


@pytest.mark.parametrize("sim_vq", [False, True])
def test_initialization_sets_the_codes_to_the_centroids(sim_vq):
    module = Quantizer(2, 2, mode=QuantizeMode.STRAIGHT_THROUGH, sim_vq=sim_vq)
    module.initialize_(torch.tensor([[0.0, 0.0], [0.0, 2.0], [8.0, 0.0], [8.0, 2.0]]), num_iterations=10, seed=0)
    assert sorted(module.codebook().tolist()) == [[0.0, 1.0], [8.0, 1.0]]
