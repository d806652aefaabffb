import pytest
import torch

import ops


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


def test_gradcheck() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 4])
    assert torch.autograd.gradcheck(
        lambda logits: ops.cross_entropy_small_vocab(logits, target, label_smoothing=0.1), logits
    )


def test_wrong_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected target \[3\], got \[2\] int64"):
        ops.cross_entropy_small_vocab(torch.zeros(3, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="target as int64"):
        ops.cross_entropy_small_vocab(torch.zeros(1, 4), torch.zeros(1))
