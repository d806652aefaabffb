import math

import pytest
import torch

from modules.estimators import gumbel_softmax_choice, rotation_trick, straight_through

CODEBOOK = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x)


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
    cold = gumbel_softmax_choice(residual, CODEBOOK, 1e-4)
    torch.testing.assert_close(cold, torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))


def test_gumbel_softmax_by_hand():
    # Distances 1 and 9, unit 1 (the nearest), temperature 4: the second weight is sigmoid(-8 / 4 + g1 - g0).
    residual, codebook = torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0]])
    torch.manual_seed(3)
    noise = -torch.empty(1, 2).exponential_().log()
    torch.manual_seed(3)
    second = torch.sigmoid(-8 / 4.0 + noise[0, 1] - noise[0, 0])
    expected = torch.stack([1 - second, second])[None]
    torch.testing.assert_close(gumbel_softmax_choice(residual, codebook, 4.0), expected)


def test_gumbel_softmax_gradient_by_hand():
    # With weight p of the second code: value 4 p, logits apart by (1 - 9) / 4 + noise, whose slope is 2 (4 - 0) / 4.
    residual = torch.tensor([[1.0]], requires_grad=True)
    codebook = torch.tensor([[0.0], [4.0]], requires_grad=True)
    torch.manual_seed(3)
    noise = -torch.empty(1, 2).exponential_().log()
    torch.manual_seed(3)
    (gumbel_softmax_choice(residual, codebook, 4.0) @ codebook).sum().backward()
    p = torch.sigmoid(-8 / 4.0 + noise[0, 1] - noise[0, 0])
    torch.testing.assert_close(residual.grad, (4 * p * (1 - p) * 2.0).reshape(1, 1))
    # Codes gain their weights, and 4 p (1 - p) times the slopes of their logits: 2 (1 - 0) / 4 and 2 (1 - 4) / 4.
    slope = 4 * p * (1 - p)
    torch.testing.assert_close(codebook.grad, torch.stack([1 - p - slope * 0.5, p - slope * 1.5]).reshape(2, 1))


def test_gumbel_noise_does_not_depend_on_the_scale_of_features():
    residual = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    small = gumbel_softmax_choice(residual, CODEBOOK, 0.5)
    torch.manual_seed(1)
    large = gumbel_softmax_choice(residual * 100, CODEBOOK * 100, 0.5)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-5)
