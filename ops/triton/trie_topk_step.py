"""One step of an exact beam search over a prefix trie, without a sort.

Every beam has K places for children, which ascend by beam, then edge, hence by node. One kernel scores the places of a
beam, another selects among the places of a row. Where those are too many for one program, several make a shortlist
first, in rounds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.reference.leaf_filter import LeafFilter
from ops.triton.library import define
from ops.triton.parts import cdiv, power_of_2, wide

_MAX_PLACES = 16384
"""Whose keys a selecting program holds in registers."""

_NO_CHILD = tl.constexpr(-0x80000000)
"""Key of a place without a child; below that of -inf."""


@triton.jit
def _ordered(x):
    """Int32 that compare as the fp32 numbers do, both zeros being equal; above the smallest int32 unless x is NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _kth_largest(keys, k, SIZE: tl.constexpr):
    """The highest number that at least k of the SIZE keys reach, or a lower one that exactly k reach.

    Found bit by bit from the highest, whose meaning in a signed number is reversed. The smallest int32 if SIZE < k.
    """
    found = tl.full([], -0x80000000, tl.int32)
    reaching = tl.full([], SIZE, tl.int32)
    bit = tl.full([], 31, tl.int32)
    while (bit >= 0) & (reaching != k):
        higher = found ^ (tl.full([], 1, tl.int32) << bit)
        count = tl.sum((keys >= higher).to(tl.int32), 0)
        found = tl.where(count >= k, higher, found)
        reaching = tl.where(count >= k, count, reaching)
        bit -= 1
    return found


@triton.jit
def _log_sum_exp(x):
    """Of a block; NaN or infinite if an element is."""
    highest = tl.max(x, 0)
    highest = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    return tl.log(tl.sum(tl.exp(x - highest), 0)) + highest


@triton.jit
def _num_below(leaves_ptr, begin, end, leaves):
    """How many of the ascending numbers begin..end-1 behind leaves_ptr are below each of `leaves`."""
    leaves_ptr += begin
    num_below = leaves * 0  # at least; at most `size` more
    size = end - begin
    while size > 1:
        half = size // 2
        is_below = tl.load(leaves_ptr + num_below + (half - 1)) < leaves
        num_below = tl.where(is_below, num_below + half, num_below)
        size -= half
    is_below = tl.load(leaves_ptr + num_below, mask=(num_below >= 0) & (size == 1), other=0x7FFFFFFF) < leaves
    return num_below + is_below.to(tl.int32)


@triton.jit
def _permitted(
    edges,
    exists,
    row,
    leaf_begins_ptr,
    offsets_ptr,
    leaves_ptr,
    only_ptr,
    allowed_before_ptr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BEGINS: tl.constexpr,
):
    """Whether the row may reach a leaf below each edge that exists; `LeafFilter.permits` is its twin."""
    first, last = edges, edges + 1
    if HAS_BEGINS:
        first = tl.load(leaf_begins_ptr + edges, mask=exists, other=0)
        last = tl.load(leaf_begins_ptr + edges + 1, mask=exists, other=0)
    total = last - first
    if HAS_ALLOWED:
        total = tl.load(allowed_before_ptr + last, mask=exists, other=0)
        total -= tl.load(allowed_before_ptr + first, mask=exists, other=0)
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    listed = _num_below(leaves_ptr, begin, end, last) - _num_below(leaves_ptr, begin, end, first)
    return tl.where(tl.load(only_ptr + row) != 0, listed > 0, listed < total)


@triton.jit
def _trie_topk_step_score_kernel(
    logits_ptr,  # [B, W, K]
    nodes_ptr,  # [B, W] int64, -1 for no beam
    scores_ptr,  # [B, W] fp32
    row_ptr,  # [M+1] int32, edges of every node
    edge_codes_ptr,  # [E] int16 or int32
    leaf_begins_ptr,  # [E+1] int32, leaves below every edge; edges are leaves unless HAS_BEGINS
    offsets_ptr,  # [B+1] int32, boundaries of the rows' sets of leaves; read only if HAS_FILTER, as are the next three
    leaves_ptr,  # [T] int32, ascending within a row
    only_ptr,  # [B] uint8, whether a row may reach its set alone, or anything but its set
    allowed_before_ptr,  # [N+1] int32, leaves before each one that all rows may reach; read only if HAS_ALLOWED
    keys_ptr,  # [B, W, K] int32 out, ordered as the children's scores
    num_beams,
    num_codes,
    NORMALIZE: tl.constexpr,  # "level", "children" or "none"
    HAS_FILTER: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BEGINS: tl.constexpr,
    CODES: tl.constexpr,
):
    beam = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CODES)
    is_place = places < num_codes
    logits_ptr += beam * num_codes
    node = tl.load(nodes_ptr + beam)
    begin = tl.load(row_ptr + tl.maximum(node, 0))
    end = tl.load(row_ptr + tl.maximum(node, 0) + 1)
    edges = begin + places
    exists = is_place & (edges < end) & (node >= 0)
    codes = tl.load(edge_codes_ptr + edges, mask=exists, other=0).to(tl.int32)
    own = wide(tl.load(logits_ptr + codes, mask=exists, other=float("-inf")))
    if NORMALIZE == "level":
        own -= _log_sum_exp(wide(tl.load(logits_ptr + places, mask=is_place, other=float("-inf"))))
    if NORMALIZE == "children":
        own -= _log_sum_exp(own)
    scores = tl.load(scores_ptr + beam) + own
    if HAS_FILTER:
        exists = exists & _permitted(
            edges, exists, beam // num_beams, leaf_begins_ptr, offsets_ptr, leaves_ptr, only_ptr, allowed_before_ptr,
            HAS_ALLOWED, HAS_BEGINS,
        )  # fmt: skip
    keys = tl.where(exists & (scores == scores), _ordered(scores), _NO_CHILD)
    tl.store(keys_ptr + beam * num_codes + places, keys, mask=is_place)


@triton.jit
def _select(keys_ptr, num_places, k, slots_ptr, PLACES: tl.constexpr, CHUNK: tl.constexpr):
    """Writes the places of the k highest of PLACES keys, ascending, to slots_ptr; returns how many there are.

    Winners are those above the last one's key, and of those with that key the lowest places up to k. Other threads may
    read the slots once all have been here.
    """
    places = tl.arange(0, PLACES)
    keys = tl.load(keys_ptr + places, mask=places < num_places, other=_NO_CHILD)
    last = _kth_largest(keys, k, PLACES)
    room = k - tl.sum((keys > last).to(tl.int32), 0)
    num_above, num_level = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, PLACES, CHUNK):  # read again in parts, which need fewer registers than the whole
        place = first + tl.arange(0, CHUNK)
        key = tl.load(keys_ptr + place, mask=place < num_places, other=_NO_CHILD)
        above = (key > last).to(tl.int32)
        level = ((key == last) & (key != _NO_CHILD)).to(tl.int32)
        counts = above + (level << 16)  # both in one running sum
        until = tl.cumsum(counts, 0)
        above_before = num_above + ((until - counts) & 0xFFFF)
        level_before = num_level + ((until - counts) >> 16)
        wins = (above != 0) | ((level != 0) & (level_before < room))
        slots = above_before + tl.minimum(level_before, room)
        tl.store(slots_ptr + slots, place.to(slots_ptr.dtype.element_ty), mask=wins)
        in_chunk = tl.sum(counts, 0)
        num_above += in_chunk & 0xFFFF
        num_level += in_chunk >> 16
    tl.debug_barrier()
    return num_above + tl.minimum(num_level, room)


@triton.jit
def _trie_topk_step_shortlist_kernel(
    keys_ptr,  # [B, P] int32
    places_ptr,  # [B, P] int32, the places whose keys they are; read only if HAS_PLACES, else 0, 1, ...
    out_keys_ptr,  # [B, parts, beam_width] int32 out
    out_places_ptr,  # [B, parts, beam_width] int32 out, ascending where there are keys
    num_places,  # P
    num_parts,
    beam_width,
    HAS_PLACES: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, first = program // num_parts, (program % num_parts).to(tl.int32) * PLACES
    keys_ptr += row * num_places + first
    places_ptr += row * num_places + first
    out_keys_ptr += program * beam_width
    out_places_ptr += program * beam_width
    num_winners = _select(keys_ptr, num_places - first, beam_width, out_places_ptr, PLACES, CHUNK)
    for first_slot in range(0, beam_width, SLOTS):
        slot = first_slot + tl.arange(0, SLOTS)
        is_winner = slot < num_winners
        winner = tl.load(out_places_ptr + slot, mask=is_winner, other=0)
        tl.debug_barrier()  # several threads may hold one slot: all have read it before one of them overwrites it
        place = first + winner
        if HAS_PLACES:
            place = tl.load(places_ptr + winner, mask=is_winner, other=0)
        key = tl.load(keys_ptr + winner, mask=is_winner, other=_NO_CHILD)
        tl.store(out_keys_ptr + slot, key, mask=slot < beam_width)
        tl.store(out_places_ptr + slot, place, mask=slot < beam_width)


@triton.jit
def _trie_topk_step_select_kernel(
    keys_ptr,  # [B, P] int32
    places_ptr,  # [B, P] int32, the places whose keys they are; read only if HAS_PLACES, else 0, 1, ...
    nodes_ptr,  # [B, W] int64
    row_ptr,  # [M+1] int32
    edge_codes_ptr,  # [E] int16 or int32
    out_parents_ptr,  # [B, beam_width] int64 out
    out_codes_ptr,  # [B, beam_width] int64 out
    out_nodes_ptr,  # [B, beam_width] int64 out; holds winners for a while
    out_scores_ptr,  # [B, beam_width] fp32 out
    num_places,  # P
    num_beams,
    num_codes,
    beam_width,
    HAS_PLACES: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * num_places
    places_ptr += row * num_places
    out_nodes_ptr += row * beam_width
    num_winners = _select(keys_ptr, num_places, beam_width, out_nodes_ptr, PLACES, CHUNK)
    for first_slot in range(0, beam_width, SLOTS):
        slot = first_slot + tl.arange(0, SLOTS)
        is_winner = slot < num_winners
        winner = tl.load(out_nodes_ptr + slot, mask=is_winner, other=0).to(tl.int32)
        tl.debug_barrier()  # several threads may hold one slot: all have read it before one of them overwrites it
        place = winner
        if HAS_PLACES:
            place = tl.load(places_ptr + winner, mask=is_winner, other=0)
        parent = place // num_codes
        node = tl.load(nodes_ptr + row * num_beams + parent, mask=is_winner, other=0)
        edge = tl.load(row_ptr + node, mask=is_winner, other=0) + place % num_codes
        code = tl.load(edge_codes_ptr + edge, mask=is_winner, other=0)
        winner_key = tl.load(keys_ptr + winner, mask=is_winner, other=0)
        score = tl.where(winner_key < 0, winner_key ^ 0x7FFFFFFF, winner_key).to(tl.float32, bitcast=True)
        at, exists = row * beam_width + slot, slot < beam_width
        tl.store(out_parents_ptr + at, parent.to(tl.int64), mask=exists)
        tl.store(out_codes_ptr + at, code.to(tl.int64), mask=exists)
        tl.store(out_nodes_ptr + slot, tl.where(is_winner, edge, -1).to(tl.int64), mask=exists)
        tl.store(out_scores_ptr + at, tl.where(is_winner, score, float("-inf")), mask=exists)


def supports(num_beams: int, num_codes: int, beam_width: int) -> bool:
    """Whether a program holds the codes of a beam and, where it cannot hold the places of a row, shortlists help."""
    return num_codes <= _MAX_PLACES and (num_beams * num_codes <= _MAX_PLACES or 2 * beam_width <= _MAX_PLACES)


def _score_blocks(num_codes: int) -> dict[str, int]:
    codes = power_of_2(num_codes)
    return {"CODES": codes, "num_warps": max(1, min(16, codes // 256))}


def _select_blocks(num_places: int, beam_width: int) -> dict[str, int]:
    """32 places per thread, 8 at a time."""
    places = power_of_2(min(num_places, _MAX_PLACES))
    return {
        "PLACES": places,
        "CHUNK": max(16, places // 4),
        "SLOTS": power_of_2(min(beam_width, 256)),
        "num_warps": max(1, places // 1024),
    }


def _forward(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    beam_width: int,
    normalize: str,
    leaf_begins: Tensor | None,
    offsets: Tensor | None,
    leaves: Tensor | None,
    only: Tensor | None,
    allowed_before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_beams, num_codes = logits.shape
    outputs = _new_outputs(nodes, scores, beam_width)
    if num_rows > 0:
        keys = torch.empty(logits.shape, dtype=torch.int32, device=logits.device)
        optional = [leaf_begins, offsets, leaves, only, allowed_before]
        _trie_topk_step_score_kernel[(num_rows * num_beams,)](
            logits, nodes, scores, row_ptr, edge_codes, *(row_ptr if part is None else part for part in optional), keys,
            num_beams, num_codes, NORMALIZE=normalize, HAS_FILTER=offsets is not None,
            HAS_ALLOWED=allowed_before is not None, HAS_BEGINS=leaf_begins is not None, **_score_blocks(num_codes),
        )  # fmt: skip
        keys, places = _shortlist(keys.view(num_rows, -1), beam_width)
        _trie_topk_step_select_kernel[(num_rows,)](
            keys, keys if places is None else places, nodes, row_ptr, edge_codes, *outputs, keys.shape[1], num_beams,
            num_codes, beam_width, HAS_PLACES=places is not None, **_select_blocks(keys.shape[1], beam_width),
        )  # fmt: skip
    return outputs


def _shortlist(keys: Tensor, beam_width: int) -> tuple[Tensor, Tensor | None]:
    """Keys [B, P], no more than a program holds, and their places among the given ones; None if they are all."""
    places = None
    num_rows = len(keys)
    while keys.shape[1] > _MAX_PLACES:
        num_places, num_parts = keys.shape[1], cdiv(keys.shape[1], _MAX_PLACES)
        best = torch.empty(num_rows, num_parts * beam_width, dtype=torch.int32, device=keys.device)
        best_places = torch.empty_like(best)
        _trie_topk_step_shortlist_kernel[(num_rows * num_parts,)](
            keys, keys if places is None else places, best, best_places, num_places, num_parts, beam_width,
            HAS_PLACES=places is not None, **_select_blocks(num_places, beam_width),
        )  # fmt: skip
        keys, places = best, best_places
    return keys, places


def _fake_forward(
    logits: Tensor, nodes: Tensor, scores: Tensor, row_ptr: Tensor, edge_codes: Tensor, beam_width: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(nodes, scores, beam_width)


def _new_outputs(nodes: Tensor, scores: Tensor, beam_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parents, codes, nodes and scores."""
    shape = (nodes.shape[0], beam_width)
    parents, codes, children = (nodes.new_empty(shape) for _ in range(3))
    return parents, codes, children, scores.new_empty(shape)


FORWARD = define(
    "trie_topk_step(Tensor logits, Tensor nodes, Tensor scores, Tensor row_ptr, Tensor edge_codes, SymInt beam_width, "
    "str normalize, Tensor? leaf_begins, Tensor? offsets, Tensor? leaves, Tensor? only, Tensor? allowed_before) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)


def trie_topk_step(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    beam_width: int,
    normalize: str = "level",
    leaf_filter: LeafFilter | None = None,
    leaf_begins: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.trie_topk_step`."""
    tensors = [tensor.contiguous() for tensor in (logits, nodes, scores, row_ptr, edge_codes)]
    optional: list[Tensor | None] = [None] * 5
    if leaf_filter is not None:
        offsets, leaves, only, allowed_before = leaf_filter
        optional = [leaf_begins, offsets, leaves, only.contiguous().view(torch.uint8), allowed_before]
    return FORWARD(*tensors, beam_width, normalize, *(None if part is None else part.contiguous() for part in optional))
