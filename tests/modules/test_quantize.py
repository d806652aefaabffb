import pytest
import torch

from modules.estimators import QuantizeMode
from modules.quantize import Distance, LevelConfig, Quantizer

CODEBOOK = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])


def quantizer(mode=QuantizeMode.STRAIGHT_THROUGH, weight=CODEBOOK, **settings):
    module = Quantizer(weight.shape[1], LevelConfig(size=len(weight), mode=mode, **settings))
    module.set_codes_(weight)
    return module


@pytest.mark.parametrize("mode", QuantizeMode)
def test_evaluation_takes_the_nearest_code_in_every_mode(mode):
    module = quantizer(mode).eval()
    embedding, codes = module(torch.tensor([[1.9, 0.3], [0.4, 1.2]]))
    assert codes.tolist() == [1, 2]
    assert embedding.tolist() == [[2.0, 0.0], [0.0, 2.0]]


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


def test_a_cold_soft_choice_is_the_nearest_by_the_distance_of_the_level():
    module = quantizer(
        QuantizeMode.GUMBEL_SOFTMAX, torch.tensor([[4.0, 0.0], [6.0, 8.0]]), distance=Distance.COSINE
    ).train()
    residual = torch.tensor([[1.0, 1.0], [1.0, 0.2]], requires_grad=True)  # both are nearer to (4, 0)
    embedding, codes = module(residual, 1e-4)
    assert codes.tolist() == [1, 0]
    torch.testing.assert_close(embedding, torch.tensor([[6.0, 8.0], [4.0, 0.0]]))
    module(residual, 5.0).embedding.sum().backward()
    assert (module.weight.grad.norm(dim=1) > 0).all()
    # Only the direction counts, so none of the gradient changes a length.
    torch.testing.assert_close((residual.grad * residual).sum(dim=1), torch.zeros(2), atol=1e-5, rtol=0.0)
    assert (residual.grad.norm(dim=1) > 0).all()


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
    module = quantizer(weight=torch.zeros(2, 2), sim_vq=sim_vq)
    module.initialize_(torch.tensor([[0.0, 0.0], [0.0, 2.0], [8.0, 0.0], [8.0, 2.0]]), seed=0)
    assert sorted(module.codebook().tolist()) == [[0.0, 1.0], [8.0, 1.0]]


def test_cosine_chooses_by_direction_with_the_gradient_of_the_code():
    module = quantizer(weight=torch.tensor([[4.0, 0.0], [10.0, 1.0]]), distance=Distance.COSINE)
    embedding, codes = module(torch.tensor([[3.0, 0.29], [1.0, 0.0]]))
    assert codes.tolist() == [1, 0]
    assert embedding.tolist() == [[10.0, 1.0], [4.0, 0.0]]
    embedding.sum().backward()
    assert module.weight.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_moving_averages_by_hand():
    module = quantizer(weight=torch.tensor([[0.0], [4.0], [9.0]]), ema_decay=0.75).train()
    embedding, codes = module(torch.tensor([[1.0], [1.5], [5.0]]))
    assert codes.tolist() == [0, 0, 1]
    assert embedding.tolist() == [[0.0], [0.0], [4.0]]  # of before the update
    # counts 0.75 + 0.25 n, sums 0.75 c + 0.25 s, from one row at each code
    assert module.ema_counts.tolist() == [1.25, 1.0, 0.75]
    torch.testing.assert_close(module.ema_sums, torch.tensor([[0.625], [4.25], [6.75]]))
    torch.testing.assert_close(module.codebook(), torch.tensor([[0.5], [4.25], [9.0]]))
    assert not module.weight.requires_grad
    assert not embedding.requires_grad


def test_moving_averages_rest_in_evaluation():
    module = quantizer(ema_decay=0.5).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(torch.randn(10, 2))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_code_whose_past_fades_keeps_its_place():
    module = quantizer(weight=torch.tensor([[0.0], [4.0]]), ema_decay=0.5).train()
    for _ in range(100):
        module(torch.tensor([[0.1]]))
    assert module.codebook()[1].item() == pytest.approx(4.0)
    assert module.codebook().isfinite().all()


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_codes_without_rows_move_to_rows_of_the_batch(ema_decay):
    module = quantizer(weight=torch.tensor([[0.0], [50.0], [90.0]]), restart_after=2, ema_decay=ema_decay).train()
    rows = torch.tensor([[0.1], [0.2], [-0.1], [0.0]])
    for step in range(2):
        module(rows)
        assert module.idle_steps.tolist() == [0, step + 1, step + 1]
    codes = module(rows).codes
    moved = module.codebook().detach()[1:]
    assert all(row in rows.flatten().tolist() for row in moved.flatten().tolist()) or ema_decay > 0
    assert moved.abs().max() <= 0.2
    assert len(set(codes.tolist())) > 1
    assert module.idle_steps[0] == 0


def test_restart_in_a_batch_smaller_than_the_codebook():
    module = quantizer(weight=torch.full((6, 1), 9.0), restart_after=1).train()
    module.idle_steps.fill_(5)
    module(torch.tensor([[1.0], [2.0]]))
    assert set(module.codebook().flatten().tolist()) == {1.0, 2.0}


def test_balanced_choice_in_training_and_the_nearest_after_it():
    module = quantizer(weight=torch.tensor([[0.0], [1.0]]), sinkhorn_epsilon=0.01)
    rows = torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    assert module.train()(rows).codes.tolist() == [0, 0, 1, 1]
    module.train()(rows).embedding.sum().backward()
    assert module.weight.grad.flatten().tolist() == [2.0, 2.0]  # of the codes that were given, not of the nearest
    embedding, codes = module.eval()(rows)
    assert codes.tolist() == [0, 0, 0, 0]
    assert embedding.flatten().tolist() == [0.0] * 4


def test_buffers_survive_saving():
    module = quantizer(ema_decay=0.9, restart_after=3).train()
    module(torch.randn(5, 2))
    other = quantizer(ema_decay=0.9, restart_after=3)
    other.load_state_dict(module.state_dict())
    rows = torch.randn(5, 2)
    assert torch.equal(module(rows).embedding, other.train()(rows).embedding)
    assert torch.equal(module.ema_sums, other.ema_sums)
    assert torch.equal(module.idle_steps, other.idle_steps)
