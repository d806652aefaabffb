"""What the codes of a level cost given items, from their features and a frozen RQ-VAE."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.feature_rows import HALF, FeatureMatrix, to_tensor
from modules.rqvae import RqVae
from modules.tokenizer.assign import BLOCK_ROWS

_BLOCK = 64
"""Items whose costs are computed at once. Blocks are filled up to it, so that costs round alike in all of them."""


class ItemCosts:
    """The latents of some items, and how far each code is from what the levels before leave of them.

    Args:
        rqvae: in evaluation mode.
        features: [N, input_dim], read in slices of rows.
        item_ids: [R] int64 ascending, the rows that costs will be asked for.
        encoder_dtype: as for `assign_codes`.
    """

    def __init__(
        self, rqvae: RqVae, features: FeatureMatrix, item_ids: Tensor, *, encoder_dtype: torch.dtype = torch.float32
    ) -> None:
        self._rqvae = rqvae
        self._item_ids = item_ids.cpu()
        self._latents = _latents(rqvae, features, self._item_ids, encoder_dtype)
        self._codebooks = [codebook.detach() for codebook in rqvae.codebooks()]

    @torch.no_grad()
    def __call__(self, item_ids: Tensor, codes: Tensor, level: int) -> Tensor:
        """[R, K] costs of every code of a level.

        Args:
            item_ids: [R] int64, in any order, of the items given before.
            codes: [R, level or more] int64, what the items have at the levels before.
            level: from 0.

        Returns:
            fp32 on the CPU, as `RqVae.level_costs` has them.
        """
        device = self._latents.device
        places = torch.searchsorted(self._item_ids, item_ids).to(device)
        codes = codes.to(device)
        costs = []
        for begin in range(0, len(places), _BLOCK):
            residual = self._latents[places[begin : begin + _BLOCK]]
            for before in range(level):
                residual = residual - self._codebooks[before][codes[begin : begin + _BLOCK, before]]
            full = F.pad(residual, (0, 0, 0, _BLOCK - len(residual)))
            costs.append(self._rqvae.level_costs(full, level)[: len(residual)].cpu())
        return torch.cat(costs) if costs else torch.empty(0, len(self._codebooks[level]))


@torch.no_grad()
def _latents(rqvae: RqVae, features: FeatureMatrix, item_ids: Tensor, encoder_dtype: torch.dtype) -> Tensor:
    """[R, embed_dim] of some rows on the RQ-VAE's device, in blocks of one shape, as `assign_codes` encodes them."""
    device = next(rqvae.parameters()).device
    size = BLOCK_ROWS.get(device.type, BLOCK_ROWS["cuda"])
    half = encoder_dtype in HALF
    latents = torch.empty(len(item_ids), rqvae.config.embed_dim, device=device)
    for begin, block in _rows_of(features, item_ids, size):
        full = F.pad(block, (0, 0, 0, size - len(block))).to(device)
        with torch.autocast(device.type, dtype=encoder_dtype if half else None, enabled=half):
            latents[begin : begin + len(block)] = rqvae.encode(full if half else full.float())[: len(block)]
    return latents


def _rows_of(features: FeatureMatrix, item_ids: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Some of the rows, up to `size` of them at a time, and the place of the first; read in slices."""
    begin, waiting, num_waiting = 0, [], 0
    for start in range(0, features.shape[0], size):
        low, high = torch.searchsorted(item_ids, torch.tensor([start, start + size])).tolist()
        if low == high:
            continue
        block = to_tensor(features[start : start + size])
        waiting.append(block[(item_ids[low:high] - start).to(block.device)])
        num_waiting += high - low
        if num_waiting >= size:
            rows = torch.cat(waiting)
            yield begin, rows[:size]
            begin, waiting, num_waiting = begin + size, [rows[size:]], num_waiting - size
    if num_waiting:
        yield begin, torch.cat(waiting)
