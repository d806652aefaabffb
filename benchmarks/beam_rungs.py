"""The contenders of `benchmarks.beam_search`, which describes them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.catalogues import memory_mb, random_semantic_ids
from benchmarks.dense_mask import DenseMask
from benchmarks.hf_generate import HfGenerator
from benchmarks.histories import LEVEL_SIZES, MAX_HISTORY, NUM_ITEMS
from benchmarks.rungs import OURS, UnavailableError
from data.schemas import SeqBatch, TokenizedSeqBatch
from modules.generation.beam import Normalize, beam_search, search_beams
from modules.generation.trie import PrefixTrie
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer
from ops.graphs import GraphedCall

Lists = tuple[Tensor, Tensor]
"""Item ids and scores, [B, W] each, best first."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What all contenders share.

    Attributes:
        model: in evaluation mode.
        semantic_ids: [N, L] of the catalogue, on the model's device.
        tokenizer: of the items that occur in histories.
        histories: the batch.
        dtype: "fp32", or "bf16" for autocast.
    """

    model: EncoderDecoderRetrievalModel
    semantic_ids: Tensor
    tokenizer: SequenceTokenizer
    histories: SeqBatch
    dtype: str

    @property
    def device(self) -> str:
        """Either "cpu" or "cuda"."""
        return self.semantic_ids.device.type

    def autocast(self) -> AbstractContextManager[Any]:
        """Of the search."""
        return torch.autocast(self.device, dtype=torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    def tokens(self) -> TokenizedSeqBatch:
        """The batch as the model reads it."""
        return self.tokenizer(self.histories)

    def trie(self) -> PrefixTrie:
        """A new one."""
        return PrefixTrie.from_semantic_ids(self.semantic_ids)


def build_model(device: str) -> EncoderDecoderRetrievalModel:
    """Random weights."""
    torch.manual_seed(0)
    return EncoderDecoderRetrievalModel(RetrievalModelConfig(languages={"text": LEVEL_SIZES})).to(device).eval()


def build_histories(lengths: np.ndarray, batch_size: int, num_items: int) -> SeqBatch:
    """The last items of users drawn at random, each user's newest left out; which items is random."""
    drawn = np.random.default_rng(0).choice(lengths, batch_size)
    counts = torch.from_numpy(np.clip(drawn - 1, 1, MAX_HISTORY))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    generator = torch.Generator().manual_seed(0)
    return SeqBatch(
        item_ids=torch.randint(min(num_items, NUM_ITEMS), (int(offsets[-1]),), generator=generator),
        offsets=offsets,
        max_len=int(counts.max()),
        user_hashes=torch.randint(1 << 62, (batch_size,), generator=generator),
    )


def build_setting(
    model: EncoderDecoderRetrievalModel, lengths: np.ndarray, *, num_items: int, batch_size: int, dtype: str
) -> Setting:
    """A random catalogue and a batch on the model's device."""
    device = model.embedding.weight.device
    semantic_ids = random_semantic_ids(num_items)
    tokenizer = SequenceTokenizer(semantic_ids[:NUM_ITEMS], model.vocabulary).to(device)
    histories = build_histories(lengths, batch_size, num_items).to(device)
    return Setting(model, semantic_ids.to(device), tokenizer, histories, dtype)


@dataclass(frozen=True)
class Rung:
    """A contender, ready to search.

    Attributes:
        search: what is timed, given the beam width.
        lists: what it finds; None where nothing is compared.
        resident_mb: of what it keeps per catalogue; None where that is not known.
    """

    search: Callable[[int], object]
    lists: Callable[[int], Lists] | None = None
    resident_mb: float | None = None


def ours(setting: Setting) -> Rung:
    """Scores over all codes of the level."""
    return _ours(setting, "level")


def ours_children(setting: Setting) -> Rung:
    """Scores over a prefix's children."""
    return _ours(setting, "children")


def _ours(setting: Setting, normalize: Normalize) -> Rung:
    trie = setting.trie()

    def search(beam_width: int) -> Lists:
        with setting.autocast():
            return beam_search(setting.model, setting.tokens(), trie, beam_width, normalize=normalize)

    return Rung(search, search, memory_mb(trie))


def ours_graphed(setting: Setting) -> Rung:
    """Recorded from item ids to item ids."""
    if not setting.device.startswith("cuda"):
        raise UnavailableError("CUDA graphs need a GPU")
    trie = setting.trie()
    calls: dict[int, GraphedCall[Lists]] = {}

    def find(beam_width: int, histories: SeqBatch) -> Lists:
        with torch.autocast("cuda", torch.bfloat16, enabled=setting.dtype == "bf16", cache_enabled=False):
            found = search_beams(setting.model, setting.tokenizer(histories), trie, beam_width)
        return found[0], found[1]

    def search(beam_width: int) -> Lists:
        if beam_width not in calls:
            calls[beam_width] = GraphedCall(
                partial(find, beam_width),
                device=torch.device(setting.device),
                name=f"benchmark of beam {beam_width}",
                memory=list(setting.model.parameters()),
            )
            for _ in range(3):  # the third call records
                calls[beam_width](setting.histories)
        if not calls[beam_width].records:
            raise UnavailableError("recording failed, see the log")
        return calls[beam_width](setting.histories)

    return Rung(search, search, memory_mb(trie))


def dense_mask(setting: Setting) -> Rung:
    """Our decoder with dense tables."""
    model = setting.model
    mask = DenseMask(setting.trie(), model.config.languages[model.language])

    def search(beam_width: int) -> Lists:
        with setting.autocast():
            return mask.search(model, setting.tokens(), beam_width)

    return Rung(search, search, mask.resident_mb)


def hf_generate(setting: Setting) -> Rung:
    """No constraint."""
    return _hf(setting, constrained=False, attention="sdpa")


def hf_generate_eager(setting: Setting) -> Rung:
    """No constraint."""
    return _hf(setting, constrained=False, attention="eager")


def hf_generate_prefix_allowed(setting: Setting) -> Rung:
    """Tuples of items only."""
    return _hf(setting, constrained=True, attention="sdpa")


def hf_generate_prefix_allowed_eager(setting: Setting) -> Rung:
    """Tuples of items only."""
    return _hf(setting, constrained=True, attention="eager")


def _hf(setting: Setting, *, constrained: bool, attention: str) -> Rung:
    generator = build_generator(setting, attention)

    def search(beam_width: int) -> object:
        with setting.autocast():
            return generator.generate(beam_width, constrained=constrained)

    return Rung(search)


def build_generator(setting: Setting, attention: str = "sdpa") -> HfGenerator:
    """T5 with the model's weights, and the batch as it takes it."""
    return HfGenerator(setting.model, setting.tokens(), setting.semantic_ids, attention)


RUNGS: dict[str, Callable[[Setting], Rung]] = {
    function.__name__: function
    for function in (
        ours,
        ours_children,
        ours_graphed,
        dense_mask,
        hf_generate,
        hf_generate_eager,
        hf_generate_prefix_allowed,
        hf_generate_prefix_allowed_eager,
    )
}
BY_WIDTH = (OURS, "ours_graphed", "dense_mask", "hf_generate", "hf_generate_prefix_allowed")
"""Whose growth with the beam width is measured."""
BY_CATALOGUE = (OURS, "ours_children", "ours_graphed", "dense_mask")
"""Whose growth with the catalogue is measured."""
