"""Codes of many items: their features pass a frozen RQ-VAE in blocks, and stay where they are stored until then."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import InputError
from modules.feature_rows import HALF, FeatureMatrix, to_tensor
from modules.rqvae import RqVae

BLOCK_ROWS = {"cpu": 1024, "cuda": 32_768}
"""Rows encoded at once. Blocks are filled up to it, so that an item gets the same codes alone and among others."""


@torch.no_grad()
def assign_codes(
    rqvae: RqVae,
    features: FeatureMatrix,
    *,
    encoder_dtype: torch.dtype = torch.float32,
    precision: str = "ieee",
    item_keys: Sequence[str] | None = None,
) -> Tensor:
    """Codes of every row, the same for a row whatever rows surround it, and under autocast.

    Features in the memory of the RQ-VAE's device are read in place; others are copied to it while it computes.

    Args:
        rqvae: in evaluation mode.
        features: [N, input_dim].
        encoder_dtype: float32, or float16 or bfloat16 for an encoder under autocast; distances are fp32 in any case.
        precision: of the distances' products, see `ops.residual_quantize`.
        item_keys: of the rows, to be named in errors.

    Returns:
        [N, L] int64 on the RQ-VAE's device.

    Raises:
        InputError: if features are not finite or of another width.
    """
    rqvae.check_width(tuple(features.shape))
    device = next(rqvae.parameters()).device
    rows = BLOCK_ROWS.get(device.type, BLOCK_ROWS["cuda"])
    codes = torch.empty(features.shape[0], len(rqvae.quantizers), dtype=torch.int64, device=device)
    finite = torch.ones(len(codes), dtype=torch.bool, device=device)
    half = encoder_dtype in HALF
    for begin, block in _blocks(features, device, rows):
        end = begin + len(block)
        finite[begin:end] = block.sum(dim=1, dtype=torch.float32).isfinite()
        full = F.pad(block, (0, 0, 0, rows - len(block))) if len(block) < rows else block
        with torch.autocast(device.type, dtype=encoder_dtype if half else None, enabled=half):
            found = rqvae.semantic_ids(full if half else full.float(), precision=precision)
        codes[begin:end] = found[: len(block)]
    _check_finite(features, finite, item_keys)
    return codes


def _blocks(features: FeatureMatrix, device: torch.device, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows on the device, and where they begin."""
    if device.type == "cuda" and not (isinstance(features, Tensor) and features.device.type == "cuda"):
        yield from _streamed_blocks(features, device, rows)
        return
    for begin in range(0, features.shape[0], rows):
        yield begin, to_tensor(features[begin : begin + rows]).to(device)


def _streamed_blocks(features: FeatureMatrix, device: torch.device, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Two buffers on either side: while one block is computed, the next is read and copied."""
    shape, dtype = (rows, features.shape[1]), to_tensor(features[:1]).dtype
    pinned = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(2)]
    blocks = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
    copied, used = ([torch.cuda.Event(), torch.cuda.Event()] for _ in range(2))
    compute, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    copies.wait_stream(compute)
    for index, begin in enumerate(range(0, features.shape[0], rows)):
        slot = index % 2
        copied[slot].synchronize()
        source = to_tensor(features[begin : begin + rows])
        pinned[slot][: len(source)] = source
        block = blocks[slot][: len(source)]
        with torch.cuda.stream(copies):
            copies.wait_event(used[slot])
            block.copy_(pinned[slot][: len(source)], non_blocking=True)
            copied[slot].record(copies)
        compute.wait_event(copied[slot])
        yield begin, block
        used[slot].record(compute)


def _check_finite(features: FeatureMatrix, finite: Tensor, item_keys: Sequence[str] | None) -> None:
    """Refuse NaN and infinity; `finite` is false where a row's sum is not, which large values bring about too."""
    for row in (~finite).nonzero()[:, 0].tolist():
        if not bool(to_tensor(features[row : row + 1]).isfinite().all()):
            item = "" if item_keys is None else f" (item {item_keys[row]!r})"
            raise InputError(
                f"item features expected finite values, got NaN or infinity in row {row}{item}. "
                "Rebuild the item features."
            )
