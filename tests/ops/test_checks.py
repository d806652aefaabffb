"""Wrong arguments of the public ops: what is said, and that nothing is read from a device unless asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ops
from ops import checks

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_TOKENS, WIDTH = 6, 4


def offsets(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, dtype=dtype)


def x(*shape):
    return torch.ones(*(shape or (NUM_TOKENS, WIDTH)))


JAGGED = {
    "jagged_to_padded": lambda bounds, max_len: ops.jagged_to_padded(x(), bounds, max_len=max_len),
    "padded_to_jagged": lambda bounds, max_len: ops.padded_to_jagged(
        x(max(len(bounds) - 1, 0), max_len, WIDTH), bounds, num_tokens=NUM_TOKENS
    ),
    "jagged_softmax": lambda bounds, max_len: ops.jagged_softmax(x(), bounds, max_len=max_len),
    "jagged_sum": lambda bounds, max_len: ops.jagged_sum(x(), bounds, max_len=max_len),
    "jagged_mean": lambda bounds, max_len: ops.jagged_mean(x(), bounds, max_len=max_len),
    "jagged_self_attention": lambda bounds, max_len: ops.jagged_self_attention(
        x(NUM_TOKENS, 3, 1, WIDTH), bounds, max_len=max_len, scale=1.0
    ),
    "jagged_attention": lambda bounds, max_len: ops.jagged_attention(
        x(NUM_TOKENS, 1, WIDTH), x(NUM_TOKENS, 2, 1, WIDTH), bounds, bounds, max_q=max_len, max_k=max_len, scale=1.0
    ),
    "beam_cross_attention": lambda bounds, max_len: ops.beam_cross_attention(
        x(max(len(bounds) - 1, 0), 2, 1, WIDTH), x(NUM_TOKENS, 2, 1, WIDTH), bounds, max_k=max_len, scale=1.0
    ),
}
each_jagged = pytest.mark.parametrize("name", JAGGED)


@each_jagged
def test_good_offsets_are_taken(name):
    assert isinstance(JAGGED[name](offsets(0, 2, 2, 6), 4), Tensor)
    assert isinstance(JAGGED[name](offsets(0, 2, 5), 4), Tensor)  # one token belongs to no row


@each_jagged
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (offsets(0, 4, 2, 6), "rising from 0 to at most the 6 packed tokens, got first 0, last 6, smallest step -2"),
        (offsets(1, 2, 6), "rising from 0 to at most the 6 packed tokens, got first 1, last 6, smallest step 1"),
        (offsets(0, 2, 7), "rising from 0 to at most the 6 packed tokens, got first 0, last 7, smallest step 2"),
        (offsets(0, 2, 6, dtype=torch.int64), "as contiguous int32 [B+1], got [3] int64"),
        (offsets(0, 2, 6).float(), "as contiguous int32 [B+1], got [3] float32"),
        (offsets(0, 2, 6)[None], "as contiguous int32 [B+1], got [1, 3] int32"),
        (offsets(0, 9, 2, 9, 6, 9)[::2], "as contiguous int32 [B+1], got [3] int32"),
        (offsets(), "as contiguous int32 [B+1], got [0] int32"),
    ],
    ids=["falling", "first", "last", "int64", "float", "rank", "strided", "empty"],
)
def test_wrong_offsets(name, bounds, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        JAGGED[name](bounds, 4)
    assert str(caught.value).startswith(f"ops.{name} expected ")


@each_jagged
def test_a_row_longer_than_said(name):
    with pytest.raises(ValueError, match=rf"^ops\.{name} expected .* longest row \(4\), got 3\.$"):
        JAGGED[name](offsets(0, 4, 6), 3)


def test_tensors_on_two_devices():
    with pytest.raises(
        ValueError, match=r"^ops\.add_rms_norm expected tensors on one device, got x on cpu, .* on meta"
    ):
        ops.add_rms_norm(x(), None, torch.ones(WIDTH, device="meta"))


@pytest.mark.parametrize("name", JAGGED)
def test_offsets_on_another_device(name):
    with pytest.raises(ValueError, match=rf"^ops\.{name} expected tensors on one device, got .* on meta"):
        JAGGED[name](offsets(0, 2, 6).to("meta"), 4)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(value):
    with pytest.raises(ValueError, match=r"^ops\.dropout expected dropout_p in \[0, 1\), got"):
        ops.dropout(x(), dropout_p=value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.add_rms_norm(x(2, 3, 4), None, x(4)),
            "ops.add_rms_norm expected x of shape [T, D], got [2, 3, 4]",
        ),
        (lambda: ops.jagged_self_attention(x(), offsets(0, 6), max_len=6, scale=1.0), "expected qkv [T, 3, H, D]"),
        (lambda: ops.semantic_id_embedding(x(2, 2), x(), torch.tensor([0, 1])), "codes as int64, got [2, 2] float32"),
        (lambda: ops.cross_entropy_small_vocab(x(), offsets(0, 1)), "target as int64, got [2] int32"),
        (lambda: ops.residual_quantize(x(), [x(3, 5)]), "codebooks[0] of shape [K, 4] with K at least 1, got [3, 5]"),
        (
            lambda: ops.codebook_stats(x(), torch.zeros(2, dtype=torch.int64), 3),
            "codes [6] and num_codes of at least 1, got x [6, 4] float32, codes [2]",
        ),
        (lambda: ops.relu_feed_forward(x(), x(8, 5), x(4, 8)), "expected w_in [F, 4] and w_out [4, F]"),
    ],
)
def test_ranks_and_dtypes(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


class Unreadable(Tensor):
    """Stands in for a tensor on a GPU: reading its values would make the host wait."""

    @staticmethod
    def __new__(cls, value):
        return Tensor._make_subclass(cls, value)

    @property
    def device(self):
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", str(function))
        if name in {"__int__", "__bool__", "__float__", "item", "tolist", "aminmax", "diff", "max", "min", "any"}:
            raise AssertionError(f"{name} reads values of a tensor on a GPU")
        return super().__torch_function__(function, types, arguments, options or {})


READING = {
    "offsets": lambda tensor: checks.check_offsets("op", "offsets", tensor, 3),
    "max_len": lambda tensor: checks.check_max_len("op", "max_len", 1, tensor),
    "codes": lambda tensor: checks.check_codes("op", "codes", tensor, 2),
    "index": lambda tensor: checks.check_index_range("op", "index", tensor, 2),
    "level codes": lambda tensor: checks.check_level_codes("op", tensor, tensor, 2),
}


@pytest.mark.parametrize("name", READING)
def test_nothing_is_read_on_a_gpu(name):
    READING[name](Unreadable(offsets(5, 2, 9)))


@pytest.mark.parametrize("name", READING)
def test_values_are_read_on_a_gpu_in_debug_mode(name, monkeypatch):
    monkeypatch.setattr(checks, "_DEBUG", True)
    with pytest.raises(AssertionError, match="reads values"):
        READING[name](Unreadable(offsets(5, 2, 9)))


@pytest.mark.parametrize("name", READING)
def test_values_are_read_on_a_cpu(name):
    with pytest.raises(ValueError, match=r"^ops\.op expected"):
        READING[name](offsets(5, 2, 9))


@pytest.mark.parametrize(("value", "debug"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_debug_mode_is_chosen_by_the_environment(value, debug, monkeypatch):
    monkeypatch.delenv("OPS_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("OPS_DEBUG", value)
    script = "from ops import checks; print(checks._DEBUG)"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(debug)
