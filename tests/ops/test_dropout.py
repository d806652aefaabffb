import pytest
import torch

import ops
from ops.cpu.dropout import keep_mask
from ops.reference.dropout import dropout as reference

SEED = torch.tensor([0x0123456789ABCDEF])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_share_and_scale(dropout_p: float) -> None:
    torch.manual_seed(0)
    out = ops.dropout(torch.ones(1000, 1001), dropout_p=dropout_p)
    assert abs((out == 0).float().mean().item() - dropout_p) < 0.002
    torch.testing.assert_close(out.max().item(), 1 / (1 - dropout_p))
    assert out.unique().numel() == 2


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    keep = keep_mask((1 << 20,), 0.5, torch.device("cpu")).float() - 0.5
    for distance in (1, 2, 3, 4, 8):
        assert abs((keep[distance:] * keep[:-distance]).mean().item()) < 0.002


def test_zero_switches_it_off_and_the_generator_decides() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert ops.dropout(x, dropout_p=0.0) is x
    torch.manual_seed(1)
    first = ops.dropout(x, dropout_p=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(ops.dropout(x, dropout_p=0.5), first)


def test_gradient_passes_where_kept() -> None:
    x = torch.ones(50, requires_grad=True)
    out = ops.dropout(x, dropout_p=0.5)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_probability_is_checked() -> None:
    with pytest.raises(ValueError, match=r"dropout_p in \[0, 1\), got -0.1"):
        ops.dropout(torch.ones(3), dropout_p=-0.1)


@pytest.mark.parametrize("dropout_p", [1e-7, 0.9999999])
def test_probabilities_beyond_the_masks_resolution(dropout_p: float) -> None:
    torch.manual_seed(0)
    share = keep_mask((1 << 18,), dropout_p, torch.device("cpu")).float().mean().item()
    assert share == pytest.approx(1 - dropout_p, abs=1e-3)


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference(x, 0.4, SEED), x)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_a_seed_fixes_the_mask(dropout_p: float) -> None:
    x = torch.ones(500, 401)
    out = ops.dropout(x, dropout_p=dropout_p, seed=SEED)
    torch.testing.assert_close(ops.dropout(x, dropout_p=dropout_p, seed=SEED.clone()), out, rtol=0, atol=0)
    assert abs((out == 0).float().mean().item() - dropout_p) < 0.004
    other = ops.dropout(x, dropout_p=dropout_p, seed=SEED + (1 << 40))
    expected = 2 * dropout_p * (1 - dropout_p)
    assert abs((out != other).float().mean().item() - expected) < 0.004


@pytest.mark.parametrize("shape", [(), (4,), (0, 2), (2, 3, 5)], ids=str)
def test_seeded_masks_number_rows_over_all_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    out = ops.dropout(x, dropout_p=0.5, seed=SEED)
    assert out.shape == x.shape
    flat = ops.dropout(
        x.reshape(x[..., 0].numel() if shape else 1, shape[-1] if shape else 1), dropout_p=0.5, seed=SEED
    )
    assert out.flatten().tolist() == flat.flatten().tolist()


@pytest.mark.parametrize("dropout_p", [1e-7, 0.9999999])
def test_seeded_probabilities_beyond_the_masks_resolution(dropout_p: float) -> None:
    out = ops.dropout(torch.ones(4, 9, dtype=torch.float16), dropout_p=dropout_p, seed=SEED)
    assert out.unique().tolist() == [1.0 if dropout_p < 0.5 else 0.0]


def test_a_seed_elsewhere_is_named() -> None:
    with pytest.raises(ValueError, match="one device, got x on cpu, seed on meta"):
        ops.dropout(torch.ones(3), dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int64, device="meta"))
