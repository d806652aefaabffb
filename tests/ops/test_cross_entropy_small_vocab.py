import pytest
import torch

import ops
from ops.reference.cross_entropy_small_vocab import cross_entropy_small_vocab as reference


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    losses = ops.cross_entropy_small_vocab(logits, torch.tensor([2, 0, -100]))
    torch.testing.assert_close(losses, torch.tensor([1.3862944, 0.0, 0.0]))


def test_label_smoothing_spreads_evenly() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    log_probabilities = logits.log_softmax(1)[0]
    losses = ops.cross_entropy_small_vocab(logits, torch.tensor([0]), label_smoothing=0.2)
    torch.testing.assert_close(losses[0], -(0.9 * log_probabilities[0] + 0.1 * log_probabilities[1]))


def test_low_precision_logits_give_fp32_losses() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.arange(5)
    losses = ops.cross_entropy_small_vocab(logits, target)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits.float(), target, reduction="none"))


def test_gradcheck_of_the_reference() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.tensor([0, -100, 1, 2])
    for slices in (((0, 5),), ((0, 2), (2, 5))):
        assert torch.autograd.gradcheck(
            lambda logits, slices=slices: reference(logits, target, -100, 0.1, slices), logits
        )


def test_a_slice_hides_the_other_columns() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 0.0, 0.0, 9.0]], requires_grad=True)
    losses = ops.cross_entropy_small_vocab(logits, torch.tensor([1, 0]), level_slice=(1, 3))
    torch.testing.assert_close(losses, torch.tensor([0.3132617, 0.6931472]))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.2689414, -0.2689414, 0.0], [0.0, -0.5, 0.5, 0.0]]))


def test_rows_take_slices_in_turn() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([1, 2, 0, -100])
    losses = ops.cross_entropy_small_vocab(logits, target, level_slice=((0, 2), (2, 5)))
    expected = [-logits[0, :2].log_softmax(0)[1], -logits[1, 2:].log_softmax(0)[2], -logits[2, :2].log_softmax(0)[0]]
    torch.testing.assert_close(losses, torch.stack([*expected, torch.tensor(0.0)]))


def test_rows_without_target_pass_no_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    losses = ops.cross_entropy_small_vocab(logits, torch.tensor([-1, 1]), ignore_index=-1, label_smoothing=0.1)
    losses.sum().backward()
    assert losses[0] == 0
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0, 0, 0]


def test_wrong_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected target \[3\], got \[2\] int64"):
        ops.cross_entropy_small_vocab(torch.zeros(3, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="target as int64"):
        ops.cross_entropy_small_vocab(torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(ValueError, match=r"expected target in 0..3 or -100, got 4"):
        ops.cross_entropy_small_vocab(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"expected target in 0..1 or -1, got 2"):
        ops.cross_entropy_small_vocab(torch.zeros(2, 4), torch.tensor([0, 2]), ignore_index=-1, level_slice=(1, 3))
    with pytest.raises(ValueError, match="one device, got logits on cpu, target on meta"):
        ops.cross_entropy_small_vocab(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    ("level_slice", "message"),
    [
        ((2, 5), r"level_slice as \(begin, end\) within the 4 columns of logits, got \(2, 5\)"),
        ((2, 2), r"got \(2, 2\)"),
        (((0, 2), (2, 4)), "a multiple of 2 rows, one per slice, got 3"),
        ((), r"got \(\)"),
    ],
)
def test_wrong_slices_are_named(level_slice: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy_small_vocab(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), level_slice=level_slice)


def test_smoothing_is_checked() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\], got 1.5"):
        ops.cross_entropy_small_vocab(torch.zeros(1, 4), torch.tensor([0]), label_smoothing=1.5)
