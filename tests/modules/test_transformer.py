from dataclasses import replace

import pytest
import torch

from modules.transformer.attention import RelativeBias
from modules.transformer.decoder import Decoder
from modules.transformer.encoder import Encoder
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes

SIZES = StackSizes(
    d_model=12, num_heads=2, head_dim=4, d_ff=16, dropout=0.0, relative_buckets=8, relative_max_distance=16
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rows_of(*lengths: int) -> Rows:
    return Rows(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """With biases that are not zero, as after training."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def test_encoder_rows_do_not_see_each_other() -> None:
    encoder = randomized(Encoder(2, SIZES))
    x = torch.randn(9, 12, dtype=torch.float64)
    together = encoder(x, rows_of(4, 0, 5))
    alone = [encoder(part, rows_of(len(part))) for part in (x[:4], x[4:])]
    torch.testing.assert_close(together, torch.cat(alone))


def test_encoder_positions_matter_and_look_both_ways() -> None:
    encoder = randomized(Encoder(2, SIZES))
    rows = rows_of(4)
    x = torch.randn(4, 12, dtype=torch.float64)
    out = encoder(x, rows)
    assert (encoder(x.flip(0), rows).flip(0) - out).abs().max() > 1e-3
    changed = x.clone()
    changed[3] += 1.0
    assert (encoder(changed, rows)[0] - out[0]).abs().max() > 1e-6


def test_decoder_looks_back_only() -> None:
    decoder = randomized(Decoder(2, SIZES))
    encoded = torch.randn(5, 12, dtype=torch.float64)
    rows = rows_of(2, 3)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 2] += 1.0
    out, other = decoder(x, encoded, rows), decoder(changed, encoded, rows)
    torch.testing.assert_close(out[:, :2], other[:, :2], rtol=0, atol=1e-12)
    assert (out[:, 2] - other[:, 2]).abs().max() > 1e-3


def test_decoder_steps_equal_teacher_forcing() -> None:
    decoder = randomized(Decoder(2, SIZES))
    encoded = torch.randn(5, 12, dtype=torch.float64)
    rows = rows_of(2, 0, 3)
    x = torch.randn(3, 3, 12, dtype=torch.float64)
    state = decoder.start(encoded, rows, num_steps=3)
    steps = []
    for position in range(3):
        state.beams.advance_(torch.zeros(3, 1, dtype=torch.int64))
        steps.append(decoder.step(state, x[:, position : position + 1]))
    torch.testing.assert_close(torch.cat(steps, dim=1), decoder(x, encoded, rows))


def test_dropout_acts_in_training_only() -> None:
    encoder = Encoder(2, replace(SIZES, dropout=0.5))
    x, rows = torch.randn(4, 12), rows_of(4)
    assert not torch.equal(encoder(x, rows), encoder(x, rows))
    encoder.eval()
    torch.testing.assert_close(encoder(x, rows), encoder(x, rows), rtol=0, atol=0)


def test_bias_of_the_last_position() -> None:
    bias = RelativeBias(SIZES, causal=True)
    with torch.no_grad():
        bias.table[:, 0] = torch.arange(8.0)
    assert bias.of_last(4)[0].tolist() == [3, 2, 1, 0]


def test_cross_keys_and_values_in_one_product_equal_those_layer_by_layer() -> None:
    decoder = randomized(Decoder(3, SIZES))
    encoded = torch.randn(5, 12, dtype=torch.float64)
    together, alone = (list(decoder._cross_kv(encoded, one_product=one)) for one in (True, False))
    assert [kv.shape for kv in together] == [(5, 2, 2, 4)] * 3
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("one_product", [True, False])
def test_gradients_of_cross_keys_and_values(one_product: bool) -> None:
    decoder = randomized(Decoder(2, SIZES))
    encoded = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, 2, 2, 4, dtype=torch.float64) for _ in range(2)]
    kvs = decoder._cross_kv(encoded, one_product=one_product)
    loss = sum((kv * weight).sum() for kv, weight in zip(kvs, weights, strict=True))
    grad_encoded, grad_weight = torch.autograd.grad(loss, [encoded, decoder.cross_kv])
    flat = torch.stack(weights).flatten(2)
    torch.testing.assert_close(grad_encoded, torch.einsum("ltk,lkd->td", flat, decoder.cross_kv))
    torch.testing.assert_close(grad_weight, torch.einsum("ltk,td->lkd", flat, encoded))
