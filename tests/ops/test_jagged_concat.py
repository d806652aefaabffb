import pytest
import torch

import ops

FIRST = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
SECOND = torch.tensor([0, 1, 2, 3], dtype=torch.int32)


def test_rows_are_joined_and_parted() -> None:
    x, y = torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30])
    packed, offsets = ops.jagged_concat([x, y], [FIRST, SECOND])
    assert packed.tolist() == [1, 2, 10, 20, 3, 30]
    assert packed.dtype == torch.int64
    assert offsets.tolist() == [0, 3, 4, 6]
    assert offsets.dtype == torch.int32
    parts = ops.jagged_split(packed, [FIRST, SECOND], num_tokens=[3, 3])
    assert [part.tolist() for part in parts] == [[1, 2, 3], [10, 20, 30]]


def test_tails_end_up_behind_the_last_row_as_zeros() -> None:
    x, y, z = torch.tensor([1, 2, 3, 9]), torch.tensor([10, 20, 30]), torch.tensor([4, 9, 9])
    third = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    packed, offsets = ops.jagged_concat([x, y, z], [FIRST, SECOND, third])
    assert packed.tolist() == [1, 2, 10, 20, 3, 30, 4, 0, 0, 0]
    assert offsets.tolist() == [0, 3, 4, 7]
    packed[7:] = 8
    parts = ops.jagged_split(packed, [FIRST, SECOND, third], num_tokens=[4, 3, 3])
    assert [part.tolist() for part in parts] == [[1, 2, 3, 0], [10, 20, 30], [4, 0, 0]]


def test_widths_and_dtypes_are_kept() -> None:
    x, y = torch.ones(3, 2, 1, dtype=torch.bool), torch.zeros(3, 2, 1, dtype=torch.bool)
    packed, _ = ops.jagged_concat([x, y], [FIRST, SECOND])
    assert packed.shape == (6, 2, 1)
    assert packed[:, 0, 0].tolist() == [True, True, False, False, True, False]


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(own, 2, dtype=torch.float64, generator=generator, requires_grad=True) for own in (4, 3))
    assert torch.autograd.gradcheck(lambda x, y: ops.jagged_concat([x, y], [FIRST, SECOND])[0], (x, y))
    packed = torch.randn(7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.jagged_split(x, [FIRST, SECOND], num_tokens=[4, 3]), packed)


def test_it_compiles_as_one_graph() -> None:
    x, y = torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30])
    join = torch.compile(lambda x, y: ops.jagged_concat([x, y], [FIRST, SECOND]), fullgraph=True, backend="aot_eager")
    packed, offsets = join(x, y)
    assert packed.tolist() == [1, 2, 10, 20, 3, 30]
    assert offsets.tolist() == [0, 3, 4, 6]


def test_parts_that_do_not_fit_together_are_refused() -> None:
    x, y = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"two or more parts with offsets each, got 1 and 1 offsets"):
        ops.jagged_concat([x], [FIRST])
    with pytest.raises(ValueError, match=r"two or more parts with offsets each, got 2 and 1 offsets"):
        ops.jagged_split(torch.ones(6), [FIRST], num_tokens=[3, 3])
    with pytest.raises(ValueError, match=r"parts with equally many rows, got 3, 2"):
        ops.jagged_concat([x, y], [FIRST, SECOND[:3]])
    with pytest.raises(ValueError, match=r"one dtype and width, got \[3\] float32 as part 0 and \[3\] int64 as part 1"):
        ops.jagged_concat([x, y.long()], [FIRST, SECOND])
    with pytest.raises(ValueError, match=r"one dtype and width, .* \[3, 2\] float32 as part 1"):
        ops.jagged_concat([x, torch.ones(3, 2)], [FIRST, SECOND])
    with pytest.raises(ValueError, match=r"expected x of shape \[7, ...\] for parts of \[4, 3\] tokens, got \[6\]"):
        ops.jagged_split(torch.ones(6), [FIRST, SECOND], num_tokens=[4, 3])


def test_wrong_offsets_are_refused() -> None:
    x, y = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"offsets of part 1 as contiguous int32 \[B\+1\], got \[4\] int64"):
        ops.jagged_concat([x, y], [FIRST, SECOND.long()])
    with pytest.raises(ValueError, match=r"offsets of part 0 rising from 0 to at most the 3 .* smallest step -1"):
        ops.jagged_concat([x, y], [torch.tensor([0, 2, 1, 3], dtype=torch.int32), SECOND])
    with pytest.raises(ValueError, match=r"offsets of part 1 rising from 0 to at most the 2 packed tokens, .* last 3"):
        ops.jagged_split(torch.ones(6), [FIRST, SECOND], num_tokens=[4, 2])
    with pytest.raises(ValueError, match="part 0 on cpu, part 1 on cpu, offsets of part 1 on meta"):
        ops.jagged_concat([x, y], [FIRST, SECOND.to("meta")])
    with pytest.raises(ValueError, match="x on cpu, offsets of part 0 on meta"):
        ops.jagged_split(torch.ones(6), [FIRST.to("meta"), SECOND], num_tokens=[3, 3])
