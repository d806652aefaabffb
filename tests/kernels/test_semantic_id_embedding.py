from functools import partial

import pytest
import torch

import ops
from ops.reference.semantic_id_embedding import semantic_id_embedding as reference
from ops.triton import semantic_id_embedding as kernels
from tests.kernels.harness import DTYPES, compare, randn

OFFSETS = torch.tensor([0, 4, 9])
NUM_TOKENS = 12


def random_codes(num_rows):
    """Codes of levels of 4, 5 and 3; every fourth row has none and one row has some."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randint(size, (num_rows,), generator=generator) for size in (4, 5, 3)], dim=1)
    codes[::4] = -1
    codes[2:3, 1] = -7
    return codes


def run(op, codes, level_offsets, deterministic, *, table, positions=None):
    return op(codes, table, level_offsets, positions=positions, deterministic=deterministic)


def check(device, dtype, codes=None, width=20, *, offsets=OFFSETS, positions=True, deterministic=True):
    codes = random_codes(33) if codes is None else codes
    inputs = {"table": randn(NUM_TOKENS, width), "positions": randn(codes.shape[1], width, seed=1)}
    kernel = partial(run, ops.semantic_id_embedding, codes.to(device), offsets.to(device), deterministic)
    exact = partial(run, reference, codes, offsets, deterministic)
    compare(kernel, exact, inputs if positions else {"table": inputs["table"]}, dtype=dtype, device=device)


def check_atomic(device, dtype):
    check(device, dtype, deterministic=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("comparison", [check, check_atomic])
def test_parity(device, dtype, comparison):
    comparison(device, dtype)


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_few_rows(device, num_rows):
    check(device, torch.float32, random_codes(num_rows))


@pytest.mark.parametrize("deterministic", [True, False])
def test_wider_than_a_block_without_positions(device, deterministic):
    check(device, torch.float32, random_codes(5), 130, positions=False, deterministic=deterministic)


@pytest.mark.parametrize("num_codes", [31, 32, 33, 600])
def test_one_token_fills_many_chunks(device, num_codes):
    """600 equal tokens are 19 chunks, more than one program reads at once."""
    codes = torch.full((num_codes, 1), 5)
    codes[::7] = torch.arange(len(codes[::7]))[:, None] % NUM_TOKENS
    check(device, torch.float32, codes, 16, offsets=torch.tensor([0]), positions=False)


def test_a_wrong_code_on_a_device_reads_zeros(device, monkeypatch):
    monkeypatch.setattr(ops.checks, "_reads_values", lambda tensor: False)
    table = torch.ones(3, 2, device=device, requires_grad=True)
    codes = torch.tensor([[2], [3], [1 << 40]], device=device)
    rows = ops.semantic_id_embedding(codes, table, torch.tensor([0], device=device))
    rows.sum().backward()
    assert rows[:, 0].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert table.grad.sum(1).tolist() == [0.0, 0.0, 2.0]


def test_inputs_and_gradients_with_holes(device):
    codes, offsets = random_codes(6).t().contiguous().t().to(device), OFFSETS.to(device)
    table = randn(4, NUM_TOKENS).to(device).t().requires_grad_()
    rows = ops.semantic_id_embedding(codes, table, offsets)
    torch.testing.assert_close(rows, reference(codes, table, offsets, None, True))
    (got,) = torch.autograd.grad(rows.sum(), table)
    (expected,) = torch.autograd.grad(reference(codes, table, offsets, None, True).sum(), table)
    torch.testing.assert_close(got, expected)


def test_library_rules(device):
    codes, offsets, table = random_codes(6).to(device), OFFSETS.to(device), randn(NUM_TOKENS, 5).to(device)
    torch.library.opcheck(kernels.FORWARD, (codes, table, offsets, None))
    torch.library.opcheck(kernels.FORWARD, (codes, table, offsets, randn(3, 5).to(device)))
    _, tokens = kernels.FORWARD(codes, table, offsets, None)
    for positions, deterministic in ((True, True), (False, True), (False, False)):
        arguments = (randn(6, 3, 5).to(device), tokens, NUM_TOKENS, torch.float16, positions, deterministic)
        torch.library.opcheck(kernels.BACKWARD, arguments)


def test_compiles_in_one_graph(device):
    table, positions = randn(NUM_TOKENS, 5).to(device).requires_grad_(), randn(3, 5).to(device).requires_grad_()
    op = partial(run, ops.semantic_id_embedding, random_codes(6).to(device), OFFSETS.to(device), True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(function(table=table, positions=positions).sum(), (table, positions))
        for function in (compiled, op)
    ]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
