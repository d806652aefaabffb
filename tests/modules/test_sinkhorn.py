import math

import numpy as np
import pytest
import torch

from modules.sinkhorn import sinkhorn_codes, sinkhorn_log_plan


def test_two_by_two_by_hand():
    # Costs map onto [-1, 1] as [[-1, 1], [1, -1]]; by symmetry the plan is exp(-cost) over its sum, halves per row.
    plan = sinkhorn_log_plan(torch.tensor([[0.0, 4.0], [4.0, 0.0]]), 1.0).exp()
    near = 0.5 / (1 + math.exp(-2.0))
    torch.testing.assert_close(plan, torch.tensor([[near, 0.5 - near], [0.5 - near, near]]))


def test_agrees_with_plain_sinkhorn_in_double_precision():
    costs = torch.rand(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = costs.min(), costs.max()
    plan = np.exp(-((costs - (low + high) / 2) / ((high - low) / 2)).numpy() / 0.2)
    for _ in range(200):
        plan *= (1 / 7) / plan.sum(axis=0, keepdims=True)
        plan *= (1 / 30) / plan.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sinkhorn_log_plan(costs, 0.2, num_iterations=200).exp().numpy(), plan, rtol=1e-9)


@pytest.mark.parametrize(("epsilon", "tolerance"), [(1.0, 1e-4), (0.1, 1e-3), (0.05, 0.02)])
@pytest.mark.parametrize("shape", [(512, 256), (40, 100), (64, 1), (1, 8)])
def test_marginals(shape, epsilon, tolerance):
    """Rows hold exactly; columns within a share of their weight that shrinks as epsilon grows."""
    costs = torch.rand(shape, generator=torch.Generator().manual_seed(0)).square() * 1e6
    plan = sinkhorn_log_plan(costs, epsilon).exp()
    torch.testing.assert_close(plan.sum(dim=1), torch.full((shape[0],), 1 / shape[0]), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((shape[1],), 1 / shape[1]), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize(("epsilon", "num_iterations"), [(0.003, 50), (1e-4, 2000)])
def test_small_epsilon_is_finite_in_single_precision_and_spreads_rows(epsilon, num_iterations):
    generator = torch.Generator().manual_seed(0)
    rows, codes = torch.randn(512, 8, generator=generator), torch.randn(64, 8, generator=generator) * 0.2 + 1.0
    costs = torch.cdist(rows, codes).square()
    plan = sinkhorn_log_plan(costs, epsilon, num_iterations=num_iterations)
    assert plan.isfinite().all()
    nearest = torch.bincount(costs.argmin(dim=1), minlength=64)
    balanced = torch.bincount(plan.argmax(dim=1), minlength=64)
    assert (nearest == 0).sum() > 5
    assert (balanced > 0).all()
    assert balanced.max() < nearest.max() / 2


def test_equal_costs_and_one_row_are_finite():
    assert sinkhorn_log_plan(torch.ones(5, 3), 0.003).isfinite().all()
    assert sinkhorn_log_plan(torch.zeros(5, 3), 0.003).isfinite().all()
    assert sinkhorn_codes(torch.tensor([[3.0, 1.0, 2.0]]), 0.003).shape == (1,)
