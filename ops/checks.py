"""Argument checks of the public ops: what is wrong, what was expected, what was given.

Values of offsets are read on CPU tensors only; on a GPU that would make the host wait for the device.
"""

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    """Shape and dtype as error messages print them."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_rank(op: str, name: str, tensor: Tensor, shape: str) -> None:
    """Raise unless `tensor` has as many dimensions as the letters of `shape`, such as "T, H, D"."""
    if tensor.dim() != len(shape.split(",")):
        raise ValueError(f"ops.{op} expected {name} of shape [{shape}], got {shape_of(tensor)}.")


def check_offsets(op: str, name: str, offsets: Tensor, num_tokens: int) -> None:
    """Raise unless `offsets` is contiguous int32 [B+1] rising from 0 to `num_tokens`."""
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise ValueError(
            f"ops.{op} expected {name} as contiguous int32 [B+1], got {shape_of(offsets)}. "
            "Offsets start at 0 and end at the number of tokens."
        )
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != num_tokens or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"ops.{op} expected {name} rising from 0 to the {num_tokens} packed tokens, "
            f"got first {first}, last {last}, smallest step {int(offsets.diff().min()) if len(offsets) > 1 else 0}."
        )


def check_max_len(op: str, name: str, max_len: int, offsets: Tensor) -> None:
    """Raise if a row is longer than `max_len` (CPU only)."""
    if offsets.device.type != "cpu" or len(offsets) < 2:
        return
    longest = int(offsets.diff().max())
    if longest > max_len:
        raise ValueError(f"ops.{op} expected {name} at least as long as the longest row ({longest}), got {max_len}.")


def check_dropout(op: str, dropout_p: float) -> None:
    """Raise unless 0 <= dropout_p < 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"ops.{op} expected dropout_p in [0, 1), got {dropout_p}.")


def check_index_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is int64."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"ops.{op} expected {name} as int64, got {shape_of(tensor)}.")
