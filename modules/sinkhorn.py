"""Balanced assignment of rows to codes by entropic optimal transport (Cuturi 2013), in the log domain."""

import math

import torch
from torch import Tensor

_ROUND = 10
"""Iterations from one log-sum-exp to the next."""

_LEAST_WEIGHT = 1e-30
"""Below it a sum of the plan counts as this much until the next log-sum-exp, so that nothing overflows in fp32."""

_LEAST_LOG = -80.0
"""Logarithms below it, relative to the largest, count as this much: denormal numbers are ten times slower on CPUs."""


@torch.no_grad()
def sinkhorn_log_plan(costs: Tensor, epsilon: float, *, num_iterations: int = 50) -> Tensor:
    """Logarithm of the transport plan whose rows weigh 1/B each and whose columns weigh 1/K each.

    Costs are first mapped onto [-1, 1], so that one epsilon means the same for every scale of features (Zheng et al.
    2024, LC-Rec, and MQL4GRec after it). The plan itself spans more than 280 orders of magnitude at epsilon 0.003,
    which fp32 cannot hold; its scales therefore are logarithms. The first of every ten iterations is a log-sum-exp
    over them, the others multiply by the plan that it found, at a tenth of the time (Schmitzer 2019, section 3.1).

    Args:
        costs: [B, K] finite, fp32 or fp64.
        epsilon: positive; the smaller, the nearer to the cheapest plan, and the more iterations that takes.
        num_iterations: rounded up to tens; each normalises columns, then rows, so that rows hold exactly and columns
            nearly.

    Returns:
        [B, K].
    """
    num_rows, num_codes = costs.shape
    low, high = costs.amin(), costs.amax()
    half = ((high - low) / 2).clamp(min=torch.finfo(costs.dtype).tiny)
    kernel = (costs - (low + high) / 2) / (-epsilon * half)
    rows, columns = kernel.new_zeros(num_rows, 1), kernel.new_zeros(1, num_codes)
    for _ in range(-(-num_iterations // _ROUND)):
        columns = -math.log(num_codes) - _log_sum_exp(kernel + rows, dim=0)
        rows = -math.log(num_rows) - _log_sum_exp(kernel + columns, dim=1)
        plan = (kernel + rows + columns).clamp_(min=_LEAST_LOG).exp_()
        row_factor, column_factor = _scaled(plan)
        rows, columns = rows + row_factor.log(), columns + column_factor.log()
    rows = -math.log(num_rows) - _log_sum_exp(kernel + columns, dim=1)
    return kernel + rows + columns


def sinkhorn_codes(costs: Tensor, epsilon: float, *, num_iterations: int = 50) -> Tensor:
    """Code [B] int64 that has the largest share of each row of costs [B, K] under the balanced plan."""
    return sinkhorn_log_plan(costs, epsilon, num_iterations=num_iterations).argmax(dim=1)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    largest = x.amax(dim=dim, keepdim=True)
    return (x - largest).clamp_(min=_LEAST_LOG).exp_().sum(dim=dim, keepdim=True).log_() + largest


def _scaled(plan: Tensor) -> tuple[Tensor, Tensor]:
    """What a round's further iterations multiply the rows [B, 1] and columns [1, K] of a plan by."""
    num_rows, num_codes = plan.shape
    row_factor = plan.new_ones(num_rows, 1)
    column_factor = plan.new_ones(num_codes, 1)
    for _ in range(_ROUND - 1):
        column_factor = 1 / (num_codes * (plan.T @ row_factor).clamp(min=_LEAST_WEIGHT))
        row_factor = 1 / (num_rows * (plan @ column_factor).clamp(min=_LEAST_WEIGHT))
    return row_factor, column_factor.T
