import pytest
import torch

from modules.separation import separation_loss

CODEBOOK = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])


def test_by_hand():
    residual = torch.tensor([[0.5, 0.0], [0.0, 0.1], [0.3, 1.0], [1.9, 0.0]], requires_grad=True)
    codes = torch.tensor([[7, 0], [7, 0], [7, 0], [7, 1]])
    codebook = CODEBOOK.clone().requires_grad_()
    loss = separation_loss(residual, codes, codebook, margin=0.0)
    # Row 1 is nearest to code 0 and keeps it; row 0 is to take its next code, 1: 2.25 - 0.25; row 2, the third, the
    # second of its others, 2: (0.09 + 9) - (0.09 + 1); row 3 is alone.
    assert loss.tolist() == pytest.approx([2.0, 0.0, 8.0, 0.0])
    loss.sum().backward()
    # 2 (c - w): towards the wanted code
    expected = torch.tensor([[-4.0, 0.0], [0.0, 0.0], [0.0, -8.0], [0.0, 0.0]])
    torch.testing.assert_close(residual.grad, expected)
    assert codebook.grad is None


def test_margin_is_relative_to_what_is_left_over():
    residual = torch.tensor([[0.9, 0.0], [0.1, 0.0]])
    codes = torch.zeros(2, 1, dtype=torch.int64)
    plain = separation_loss(residual, codes, CODEBOOK, margin=0.0)
    assert plain.tolist() == pytest.approx([1.21 - 0.81, 0.0])
    assert separation_loss(residual, codes, CODEBOOK, margin=2.0).tolist() == pytest.approx([0.4 + 0.82, 0.0])
    scaled = separation_loss(residual * 10, codes, CODEBOOK * 10, margin=2.0)
    assert scaled.tolist() == pytest.approx([122.0, 0.0])


def test_descent_separates_rows_that_share_their_codes():
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(32, 8, generator=generator)
    start = codebook[3] + 0.2 * torch.randn(6, 8, generator=generator)
    residual = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([residual], lr=0.02)
    for _ in range(200):
        codes = torch.cdist(residual.detach(), codebook).argmin(dim=1, keepdim=True)
        optimizer.zero_grad()
        separation_loss(residual, codes, codebook, margin=0.1).sum().backward()
        optimizer.step()
    assert torch.cdist(start, codebook).argmin(dim=1).unique().numel() == 1
    assert codes.unique().numel() >= 5  # two may be sent to one code, and on from there


def test_equal_distances_go_by_position_and_more_rows_than_codes_are_fine():
    residual = torch.zeros(40, 2)
    loss = separation_loss(residual, torch.zeros(40, 2, dtype=torch.int64), CODEBOOK, margin=0.0)
    assert loss[0] == 0
    assert loss[1] == 4.0
    assert (loss[2:] == 16.0).all()


def test_one_code_one_row_and_none():
    one = torch.zeros(1, 1, dtype=torch.int64)
    assert separation_loss(torch.zeros(1, 2), one, CODEBOOK, margin=1.0).tolist() == [0.0]
    assert separation_loss(torch.zeros(0, 2), one[:0], CODEBOOK, margin=1.0).tolist() == []
    both = torch.zeros(2, 1, dtype=torch.int64)
    assert separation_loss(torch.ones(2, 2), both, CODEBOOK[:1], margin=0.0).isfinite().all()


def test_eight_full_levels_do_not_confuse_codes():
    """The product of eight codebooks of 256 is 2^64, so a key of mixed radix would wrap around."""
    codes = torch.zeros(2, 8, dtype=torch.int64)
    codes[1, 0] = 128
    assert separation_loss(torch.zeros(2, 2), codes, CODEBOOK, margin=1.0).sum() == 0
