"""The ways in which one retrieval model ranks, by name: generative, dense, hybrid."""

import re
from collections.abc import Sequence

from data.schemas import InputError
from modules.dense.hybrid import HybridRanker
from modules.dense.projected_items import ProjectedItems
from modules.dense.ranker import DenseRanker
from modules.generation.beam import Normalize
from modules.generation.ranker import GenerativeRanker
from modules.item_table import ItemTable
from modules.model import EncoderDecoderRetrievalModel
from modules.tokenizer.tokenizer import SemanticIdTokenizer

RetrievalRanker = GenerativeRanker | DenseRanker

_ALIASES = {"hybrid": "hybrid@20"}
_HYBRID = re.compile(r"hybrid@([1-9][0-9]*)")


def ranker_name(mode: str) -> str:
    """Name of the ranker of a retrieval mode.

    Args:
        mode: "generative" is beam search, "dense" the cosines of all items, "hybrid@K" ranks the first K beams and all
            cold items by cosine, "hybrid@all" every item, and "hybrid" is hybrid@20.

    Raises:
        InputError: if there is no such mode.
    """
    name = _ALIASES.get(mode, mode)
    if name in ("generative", "dense", "hybrid@all") or _HYBRID.fullmatch(name):
        return name
    raise InputError(
        f"unknown retrieval mode {mode!r}; valid modes: generative, dense, hybrid (which is hybrid@20), hybrid@K with "
        "a number K of beams, hybrid@all."
    )


def make_ranker(
    model: EncoderDecoderRetrievalModel,
    tokenizer: SemanticIdTokenizer,
    items: ItemTable | None = None,
    *,
    mode: str = "generative",
    beam_width: int = 20,
    max_history: int = 20,
    batch_size: int = 256,
    normalize: Normalize = "level",
    cuda_graphs: bool = True,
) -> RetrievalRanker:
    """The ranker of one mode; see `make_rankers`."""
    return make_rankers(
        model,
        tokenizer,
        items,
        modes=[mode],
        beam_width=beam_width,
        max_history=max_history,
        batch_size=batch_size,
        normalize=normalize,
        cuda_graphs=cuda_graphs,
    )[0]


def make_rankers(
    model: EncoderDecoderRetrievalModel,
    tokenizer: SemanticIdTokenizer,
    items: ItemTable | None = None,
    *,
    modes: Sequence[str],
    beam_width: int = 20,
    max_history: int = 20,
    batch_size: int = 256,
    normalize: Normalize = "level",
    cuda_graphs: bool = True,
) -> list[RetrievalRanker]:
    """A ranker per mode; together they keep one trie and one projection of the items.

    Args:
        model: used in evaluation mode on whatever device it lies at the time of a call.
        tokenizer: the one that the model was trained with, or one that has grown from it.
        items: of the tokenizer's catalogue, for a model that reads item features.
        modes: as for `ranker_name`.
        beam_width: of the search for beams, as are normalize and cuda_graphs; see `GenerativeRanker`.
        max_history: only a row's last items up to this number are read, as in training.
        batch_size: histories that the model reads at once.
        normalize: see there.
        cuda_graphs: see there.

    Raises:
        InputError: if a mode is unknown, named twice, or asks for a part that the model lacks or more beams than there
            are; or as for the rankers.
    """
    names = [ranker_name(mode) for mode in modes]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"expected every retrieval mode once, got {repeated[0]} {len(repeated)} times.")
    projected = None if items is None else ProjectedItems(model, items)
    settings = {"max_history": max_history, "batch_size": batch_size}
    dense = {
        name: DenseRanker(model, tokenizer, projected, name=name, **settings)
        for name in names
        if name in ("dense", "hybrid@all")
    }
    if len(dense) == len(names):
        return list(dense.values())
    generative = GenerativeRanker(
        model, tokenizer, projected, beam_width=beam_width, normalize=normalize, cuda_graphs=cuda_graphs, **settings
    )
    return [dense.get(name) or _of_beams(name, generative, tokenizer) for name in names]


def _of_beams(name: str, generative: GenerativeRanker, tokenizer: SemanticIdTokenizer) -> RetrievalRanker:
    """The ranker itself, or the hybrid that takes its beams."""
    number = _HYBRID.fullmatch(name)
    return HybridRanker(generative, tokenizer, num_beams=int(number[1])) if number else generative
