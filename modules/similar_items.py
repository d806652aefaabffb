"""Items whose quantised latent vectors, the sums of their codes' vectors, point in nearly the same direction."""

import torch
from torch import Tensor

from data.schemas import NO_ITEM, ItemFilter
from modules.tokenizer.tokenizer import SemanticIdTokenizer

_BLOCK_CELLS = 1 << 18
"""Queries times items that are scored at once: few enough to stay in a processor's cache."""

_BLOCK_QUERIES = 64
_LARGEST_ID = (1 << 32) - 1

_Products = list[list[Tensor]]
"""At [l][m] the dot products [K_l, K_m] in fp64 between the codes of levels l and m."""


@torch.no_grad()
def similar_items(
    tokenizer: SemanticIdTokenizer, item_ids: list[int], k: int, item_filter: ItemFilter
) -> tuple[Tensor, Tensor]:
    """The k items of largest cosine to each of some items, equal ones by item id.

    Items' vectors are never built: their products are sums of products between codes, which are few. Memory does not
    grow with the catalogue, which is read in blocks, and items of equal codes get equal scores.

    Args:
        tokenizer: gives every item its codes, and the codes their vectors.
        item_ids: of B items.
        k: length of the lists.
        item_filter: of B rows, the items that may be listed.

    Returns:
        item_ids [B, k] int64 and cosines [B, k] float32, filled up with -1 and -inf; a vector of length 0 has cosine 0
        with all others.

    Raises:
        InputError: if the tokenizer has no quantizer.
    """
    codebooks = [codebook.double().cpu() for codebook in tokenizer.quantizer("similar_items").codebooks()]
    products = [[one @ other.T for other in codebooks] for one in codebooks]
    codes = tokenizer.codes
    found = [torch.empty(0, k, dtype=torch.int64)]
    for begin in range(0, len(item_ids), _BLOCK_QUERIES):
        rows = slice(begin, min(begin + _BLOCK_QUERIES, len(item_ids)))
        found.append(_nearest(products, codes[item_ids[rows]], codes, k, item_filter.part(rows)))
    return _item_ids_and_scores(torch.cat(found))


def _nearest(products: _Products, queries: Tensor, codes: Tensor, k: int, item_filter: ItemFilter) -> Tensor:
    """[B, k] sort keys of the best items for [B, L] codes."""
    # tables[m][b, c]: the product of query b's vector with code c of level m.
    tables = [_looked_up(row, queries).T for row in products]
    query_norms = _norms(products, queries)
    best = _sort_keys(torch.full((len(queries), k), -torch.inf), torch.tensor(_LARGEST_ID))
    num_items = -(-_BLOCK_CELLS // len(queries))
    for begin in range(0, len(codes), num_items):
        block = codes[begin : begin + num_items]
        end = begin + len(block)
        dots = _looked_up(tables, block)
        norms = query_norms[:, None] * _norms(products, block)
        cosines = (dots / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(-1, 1).float()
        scores = cosines.masked_fill(~_flags_of(item_filter, begin, end), -torch.inf)
        keys = _sort_keys(scores, torch.arange(begin, end))
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    return best


def _looked_up(tables: list[Tensor], codes: Tensor) -> Tensor:
    """[..., C]: for [C, L] codes the sums of every level's [..., K_l] table at the code."""
    total = tables[0][..., codes[:, 0]]
    for level, table in enumerate(tables[1:], start=1):
        total = total + table[..., codes[:, level]]
    return total


def _norms(products: _Products, codes: Tensor) -> Tensor:
    """[C] lengths of the vectors of [C, L] codes."""
    squares = torch.zeros(len(codes), dtype=torch.float64)
    for row, codes_of_row in zip(products, codes.T, strict=True):
        for table, codes_of_column in zip(row, codes.T, strict=True):
            squares += table[codes_of_row, codes_of_column]
    return squares.clamp(min=0).sqrt()


def _flags_of(item_filter: ItemFilter, begin: int, end: int) -> Tensor:
    """[B, end - begin] bool: what `item_filter` says of the items begin..end-1."""
    rows = torch.repeat_interleave(item_filter.offsets.long().diff())
    inside = (item_filter.item_ids >= begin) & (item_filter.item_ids < end)
    listed = torch.zeros(len(item_filter), end - begin, dtype=torch.bool)
    listed[rows[inside], item_filter.item_ids[inside] - begin] = True
    flags = listed == item_filter.only[:, None]
    return flags if item_filter.allowed is None else flags & item_filter.allowed[begin:end]


def _sort_keys(scores: Tensor, item_ids: Tensor) -> Tensor:
    """Int64 that are larger for larger float32 scores and, where these are equal, for smaller item ids."""
    bits = (scores + 0.0).view(torch.int32)  # adding makes 0 of -0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats are ordered the other way round
    return (ordered.long() << 32) | (_LARGEST_ID - item_ids)


def _item_ids_and_scores(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `_sort_keys` was made from, with NO_ITEM for scores of -inf."""
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    item_ids = _LARGEST_ID - (keys & _LARGEST_ID)
    return item_ids.masked_fill(scores == -torch.inf, NO_ITEM), scores
