import pytest
import torch

import ops
from ops.reference.semantic_id_embedding import semantic_id_embedding as reference

TABLE = torch.arange(12.0).view(6, 2)


def test_by_hand() -> None:
    rows = ops.semantic_id_embedding(torch.tensor([[1, 0], [0, 2]]), TABLE, torch.tensor([0, 3]))
    assert rows.tolist() == [[[2, 3], [6, 7]], [[0, 1], [10, 11]]]


def test_positions_are_added_to_known_codes() -> None:
    positions = torch.tensor([[100.0, 200.0], [300.0, 400.0]])
    rows = ops.semantic_id_embedding(torch.tensor([[1, 0], [-1, 2]]), TABLE, torch.tensor([0, 3]), positions=positions)
    assert rows.tolist() == [[[102, 203], [306, 407]], [[0, 0], [310, 411]]]


def test_gradient_adds_up_repeated_rows() -> None:
    table = TABLE.clone().requires_grad_()
    ops.semantic_id_embedding(torch.tensor([[1], [1]]), table, torch.tensor([2])).sum().backward()
    assert table.grad is not None
    assert table.grad.sum(dim=1).tolist() == [0, 0, 0, 4, 0, 0]


def test_codes_below_zero_read_zeros_and_pass_no_gradient() -> None:
    table, positions = TABLE.clone().requires_grad_(), torch.ones(2, 2, requires_grad=True)
    codes = torch.tensor([[-1, 1], [-7, -1]])
    rows = ops.semantic_id_embedding(codes, table, torch.tensor([2, 3]), positions=positions)
    assert rows.tolist() == [[[0, 0], [9, 10]], [[0, 0], [0, 0]]]
    rows.sum().backward()
    assert table.grad is not None
    assert positions.grad is not None
    assert table.grad.sum(dim=1).tolist() == [0, 0, 0, 0, 2, 0]
    assert positions.grad.tolist() == [[0, 0], [1, 1]]


def test_gradcheck_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    table, positions = (
        torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((6, 2), (2, 2))
    )
    codes, offsets = torch.tensor([[1, 0], [-1, 2], [1, 2]]), torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda table, positions: reference(codes, table, offsets, positions, True), (table, positions)
    )


@pytest.mark.parametrize("codes", [[[1, 0], [0, 2]], [[1, 0], [-1, 2]]], ids=["known", "one below 0"])
def test_the_path_of_processors_equals_the_reference(codes: list[list[int]]) -> None:
    offsets = torch.tensor([0, 3])
    got = ops.semantic_id_embedding(torch.tensor(codes), TABLE, offsets)
    assert torch.equal(got, reference(torch.tensor(codes), TABLE, offsets, None, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level_offsets": torch.tensor([0])}, r"expected level_offsets \[2\]"),
        ({"level_offsets": torch.tensor([0.0, 3.0])}, "level_offsets as int64"),
        ({"codes": torch.tensor([[1, 3]])}, r"codes \+ level_offsets in 0..5, got 6"),
        ({"codes": torch.tensor([[1.0, 3.0]])}, "codes as int64"),
        ({"positions": torch.zeros(2, 3)}, r"expected positions \[2, 2\], got \[2, 3\]"),
        ({"positions": torch.zeros(2, 2, device="meta")}, "one device, got .*positions on meta"),
        ({"table": torch.zeros(6)}, r"table of shape \[num_tokens, D\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"codes": torch.tensor([[1, 0]]), "table": TABLE, "level_offsets": torch.tensor([0, 3])} | change
    with pytest.raises(ValueError, match=message):
        ops.semantic_id_embedding(**arguments)
