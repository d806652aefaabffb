"""Constrained beam search as it is usually written: dense tables of allowed codes, a padded top-k over all codes."""

import torch
from torch import Tensor

from benchmarks.catalogues import memory_mb, require_memory
from data.schemas import NO_ITEM, TokenizedSeqBatch
from modules.generation.beam import StepModel
from modules.generation.trie import PrefixTrie


class DenseMask:
    """For every prefix and code the prefix that they make, -1 where there is none.

    Args:
        trie: of the catalogue; the tables lie where it lies.
        level_sizes: codes that the model has per level.

    Raises:
        UnavailableError: if the tables do not fit into memory.
    """

    def __init__(self, trie: PrefixTrie, level_sizes: tuple[int, ...]) -> None:
        num_entries = sum((len(level.row_ptr) - 1) * size for level, size in zip(trie.levels, level_sizes, strict=True))
        require_memory(1.5 * num_entries * 4 / 2**20, "a dense table", trie.device.type)
        self._tables = [
            _dense(level.row_ptr, level.codes, size) for level, size in zip(trie.levels, level_sizes, strict=True)
        ]
        self._leaf_items = trie.leaf_items

    @property
    def resident_mb(self) -> float:
        """Memory of the tables."""
        return memory_mb([self._tables, self._leaf_items])

    @torch.no_grad()
    def search(self, model: StepModel, batch: TokenizedSeqBatch, beam_width: int) -> tuple[Tensor, Tensor]:
        """Item ids and scores [B, beam_width], as `beam_search` gives them but for ties."""
        state = model.start(batch)
        nodes = torch.zeros(len(batch), 1, dtype=torch.int64, device=self._leaf_items.device)
        scores = torch.zeros(nodes.shape, device=nodes.device)
        codes = parents = None
        for table in self._tables:
            log_probabilities = model.step(state, codes, parents).log_softmax(dim=-1)
            children = table[nodes]
            candidates = torch.where(children < 0, -torch.inf, scores[:, :, None] + log_probabilities).flatten(1)
            scores, places = candidates.topk(min(beam_width, candidates.shape[1]))
            parents, codes = places // table.shape[1], places % table.shape[1]
            nodes = children.flatten(1).gather(1, places).long().clamp(min=0)
        return torch.where(scores == -torch.inf, NO_ITEM, self._leaf_items[nodes].long()), scores


def _dense(row_ptr: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """[M, num_codes] int32 children."""
    table = torch.full((len(row_ptr) - 1, num_codes), -1, dtype=torch.int32, device=codes.device)
    parents = torch.repeat_interleave(row_ptr.diff(), output_size=len(codes))
    table[parents, codes.long()] = torch.arange(len(codes), dtype=torch.int32, device=codes.device)
    return table
