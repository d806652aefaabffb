import pytest
import torch

import ops

OFFSETS = torch.tensor([0, 2, 2, 3], dtype=torch.int32)


def test_padding_fills_the_end_of_every_row() -> None:
    padded = ops.jagged_to_padded(torch.tensor([1.0, 2.0, 3.0]), OFFSETS, max_len=3, pad=-1.0)
    assert padded.tolist() == [[1.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [3.0, -1.0, -1.0]]


def test_the_tail_is_padded_away_and_comes_back_as_zeros() -> None:
    padded = ops.jagged_to_padded(torch.tensor([1.0, 2.0, 3.0, 9.0]), OFFSETS, max_len=2)
    assert padded.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]
    assert ops.padded_to_jagged(padded, OFFSETS, num_tokens=5).tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("lengths", [[0, 0], [63, 1, 0, 64], [1]])
def test_round_trip(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(lengths), 4, 2, generator=torch.Generator().manual_seed(0))
    padded = ops.jagged_to_padded(x, offsets, max_len=64)
    torch.testing.assert_close(ops.padded_to_jagged(padded, offsets, num_tokens=len(x)), x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex128], ids=str)
def test_every_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.tensor([1, 0, 1], dtype=dtype)
    padded = ops.jagged_to_padded(x, OFFSETS, max_len=2, pad=1)
    assert torch.equal(padded, torch.tensor([[1, 0], [1, 1], [1, 1]], dtype=dtype))
    assert torch.equal(ops.padded_to_jagged(padded, OFFSETS, num_tokens=3), x)


def test_gradients() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.jagged_to_padded(x, OFFSETS, max_len=3, pad=2.0), x)
    padded = torch.randn(3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.padded_to_jagged(x, OFFSETS, num_tokens=5), padded)


def test_no_rows_and_no_tokens_have_gradients_too() -> None:
    none = torch.zeros(1, dtype=torch.int32)
    x = torch.ones(4, 2, requires_grad=True)
    padded = ops.jagged_to_padded(x, none, max_len=3)
    assert padded.shape == (0, 3, 2)
    packed = ops.padded_to_jagged(padded, none, num_tokens=4)
    assert packed.tolist() == [[0.0, 0.0]] * 4
    packed.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0]] * 4


def test_it_compiles_as_one_graph() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 9.0])
    compiled = torch.compile(lambda x: ops.jagged_to_padded(x, OFFSETS, max_len=2), fullgraph=True, backend="aot_eager")
    assert compiled(x).tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_len at least as long as the longest row \(2\), got 1"):
        ops.jagged_to_padded(torch.ones(3), OFFSETS, max_len=1)
    with pytest.raises(ValueError, match=r"expected x of shape \[T, ...\], got \[\] float32"):
        ops.jagged_to_padded(torch.tensor(1.0), OFFSETS, max_len=2)
    with pytest.raises(ValueError, match=r"expected x of shape \[3, max_len, ...\], got \[2, 2\]"):
        ops.padded_to_jagged(torch.ones(2, 2), OFFSETS, num_tokens=3)
    with pytest.raises(ValueError, match=r"x.shape\[1\] at least as long as the longest row \(2\), got 1"):
        ops.padded_to_jagged(torch.ones(3, 1), OFFSETS, num_tokens=3)
    with pytest.raises(ValueError, match=r"rising from 0 to at most the 2 packed tokens, got first 0, last 3"):
        ops.padded_to_jagged(torch.ones(3, 2), OFFSETS, num_tokens=2)


INF = float("inf")


@pytest.mark.parametrize(
    ("dtype", "pad"),
    [
        (torch.int64, 0.5),
        (torch.int64, INF),
        (torch.int64, float("nan")),
        (torch.int64, 1 << 63),
        (torch.uint8, -1),
        (torch.uint8, 256),
        (torch.bool, 2),
        (torch.float16, -1e9),
        (torch.float32, 1e300),
    ],
)
def test_a_pad_that_does_not_fit_is_refused(dtype: torch.dtype, pad: float) -> None:
    with pytest.raises(ValueError, match=r"a pad that fits x \[3\] \w+, got"):
        ops.jagged_to_padded(torch.ones(3, dtype=dtype), OFFSETS, max_len=2, pad=pad)


@pytest.mark.parametrize(
    ("dtype", "pad"), [(torch.int64, -(1 << 63)), (torch.uint8, 255.0), (torch.bool, True), (torch.float16, -INF)]
)
def test_a_pad_at_the_edge_fits(dtype: torch.dtype, pad: float) -> None:
    padded = ops.jagged_to_padded(torch.ones(3, dtype=dtype), OFFSETS, max_len=2, pad=pad)
    assert padded[1, 0].item() == pad


def test_wrong_offsets_are_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"offsets as contiguous int32 \[B\+1\], got \[4\] int64"):
        ops.jagged_to_padded(x, OFFSETS.long(), max_len=2)
    with pytest.raises(ValueError, match="got first 0, last 3, smallest step -1"):
        ops.jagged_to_padded(x, torch.tensor([0, 2, 1, 3], dtype=torch.int32), max_len=2)
    with pytest.raises(ValueError, match="tensors on one device, got x on cpu, offsets on meta"):
        ops.jagged_to_padded(x, OFFSETS.to("meta"), max_len=2)
    with pytest.raises(ValueError, match="tensors on one device, got x on cpu, offsets on meta"):
        ops.padded_to_jagged(torch.ones(3, 2), OFFSETS.to("meta"), num_tokens=3)
