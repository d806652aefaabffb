import pytest
import torch

import ops

TABLE = torch.arange(12.0).view(6, 2)


def test_by_hand() -> None:
    rows = ops.semantic_id_embedding(torch.tensor([[1, 0], [0, 2]]), TABLE, torch.tensor([0, 3]))
    assert rows.tolist() == [[[2, 3], [6, 7]], [[0, 1], [10, 11]]]


def test_gradient_adds_up_repeated_rows() -> None:
    table = TABLE.clone().requires_grad_()
    ops.semantic_id_embedding(torch.tensor([[1], [1]]), table, torch.tensor([2])).sum().backward()
    assert table.grad is not None
    assert table.grad.sum(dim=1).tolist() == [0, 0, 0, 4, 0, 0]


def test_wrong_levels_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected level_offsets \[2\]"):
        ops.semantic_id_embedding(torch.tensor([[1, 0]]), TABLE, torch.tensor([0]))
