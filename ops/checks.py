"""Argument checks of the public ops: what is wrong, what was expected, what was given.

Values of offsets are read on CPU tensors; on a GPU, where the host would wait for the device, only with OPS_DEBUG=1.
"""

import os

import torch
from torch import Tensor

_DEBUG = os.environ.get("OPS_DEBUG", "0") == "1"


def shape_of(tensor: Tensor) -> str:
    """Shape and dtype as error messages print them."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_rank(op: str, name: str, tensor: Tensor, shape: str) -> None:
    """Raise unless `tensor` has as many dimensions as the letters of `shape`, such as "T, H, D"."""
    if tensor.dim() != len(shape.split(",")):
        raise ValueError(f"ops.{op} expected {name} of shape [{shape}], got {shape_of(tensor)}.")


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device; None stands for an optional one that was not given."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"ops.{op} expected tensors on one device, got {got}.")


def check_offsets(op: str, name: str, offsets: Tensor, num_tokens: int) -> None:
    """Raise unless `offsets` is contiguous int32 [B+1] rising from 0 to at most `num_tokens`."""
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise ValueError(
            f"ops.{op} expected {name} as contiguous int32 [B+1], got {shape_of(offsets)}. "
            "Offsets start at 0 and end at the number of tokens."
        )
    if not _reads_values(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > num_tokens or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"ops.{op} expected {name} rising from 0 to at most the {num_tokens} packed tokens, "
            f"got first {first}, last {last}, smallest step {int(offsets.diff().min()) if len(offsets) > 1 else 0}."
        )


def check_max_len(op: str, name: str, max_len: int, offsets: Tensor) -> None:
    """Raise if a row is longer than `max_len`, where values are read."""
    if not _reads_values(offsets) or len(offsets) < 2:
        return
    longest = int(offsets.diff().max())
    if longest > max_len:
        raise ValueError(f"ops.{op} expected {name} at least as long as the longest row ({longest}), got {max_len}.")


def waits_for_devices() -> bool:
    """Whether values on GPUs are read, too, so that nothing can be recorded there."""
    return _DEBUG


def _reads_values(offsets: Tensor) -> bool:
    return (offsets.device.type == "cpu" or _DEBUG) and not torch.compiler.is_compiling()


def check_dropout(op: str, dropout_p: float) -> None:
    """Raise unless 0 <= dropout_p < 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"ops.{op} expected dropout_p in [0, 1), got {dropout_p}.")


def check_index_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is int64."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"ops.{op} expected {name} as int64, got {shape_of(tensor)}.")


def check_codes(op: str, name: str, codes: Tensor, num_codes: int) -> None:
    """Raise unless all codes lie in 0..num_codes-1, where values are read."""
    if not _reads_values(codes) or codes.numel() == 0:
        return
    lowest, highest = codes.aminmax()
    if int(lowest) < 0 or int(highest) >= num_codes:
        raise ValueError(f"ops.{op} expected {name} in 0..{num_codes - 1}, got {int(lowest)} to {int(highest)}.")


def check_index_range(op: str, name: str, index: Tensor, size: int, *, allowed: int | None = None) -> None:
    """Raise if an entry of `index` is neither in 0..size-1 nor `allowed`, where values are read."""
    if not _reads_values(index):
        return
    wrong = (index < 0) | (index >= size)
    if allowed is not None:
        wrong &= index != allowed
    if bool(wrong.any()):
        also = "" if allowed is None else f" or {allowed}"
        raise ValueError(f"ops.{op} expected {name} in 0..{size - 1}{also}, got {int(index[wrong][0])}.")


def check_not_flagged(
    op: str, name: str, index: Tensor, flags_name: str, flags: Tensor, *, allowed: int | None = None
) -> None:
    """Raise if an entry of `index` other than `allowed` leads to a set flag, where values are read."""
    if not _reads_values(index):
        return
    read = index if allowed is None else index[index != allowed]
    if bool(flags[read].any()):
        wrong = int(read[flags[read]][0])
        raise ValueError(f"ops.{op} expected {name} that is not {flags_name}, got {wrong}.")


def check_level_codes(op: str, codes: Tensor, level_offsets: Tensor, num_tokens: int) -> None:
    """Raise if a code that is not below 0 leads behind the table's `num_tokens` rows, where values are read."""
    if _reads_values(codes):
        check_index_range(op, "codes + level_offsets", (codes + level_offsets)[codes >= 0], num_tokens)
