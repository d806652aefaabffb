"""One step of an exact beam search over a prefix trie, without a sort.

Every beam has K places for children, which ascend by beam, then edge, hence by node. One kernel scores the places of a
beam, another selects among the places of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.library import define
from ops.triton.parts import power_of_2, wide

_MAX_PLACES = 32768
"""Of a row, whose keys the selecting program holds in registers."""

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
def _trie_topk_step_score_kernel(
    logits_ptr,  # [B, W, K]
    nodes_ptr,  # [B, W] int64, -1 for no beam
    scores_ptr,  # [B, W] fp32
    row_ptr,  # [M+1] int32, edges of every node
    edge_codes_ptr,  # [E] int32
    allowed_ptr,  # [E] or [B, E] uint8, rows allowed_stride apart; read only if HAS_ALLOWED
    keys_ptr,  # [B, W, K] int32 out, ordered as the children's scores
    num_beams,
    num_codes,
    allowed_stride,
    HAS_ALLOWED: tl.constexpr,
    CODES: tl.constexpr,
):
    beam = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CODES)
    is_place = places < num_codes
    logits_ptr += beam * num_codes
    logits = wide(tl.load(logits_ptr + places, mask=is_place, other=float("-inf")))
    highest = tl.max(logits, 0)
    highest = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    log_sum_exp = tl.log(tl.sum(tl.exp(logits - highest), 0)) + highest

    node = tl.load(nodes_ptr + beam)
    begin = tl.load(row_ptr + tl.maximum(node, 0))
    end = tl.load(row_ptr + tl.maximum(node, 0) + 1)
    edges = begin + places
    exists = is_place & (edges < end) & (node >= 0)
    codes = tl.load(edge_codes_ptr + edges, mask=exists, other=0)
    if HAS_ALLOWED:
        allowed_ptr += beam // num_beams * allowed_stride
        exists = exists & (tl.load(allowed_ptr + edges, mask=exists, other=0) != 0)
    own = wide(tl.load(logits_ptr + codes, mask=exists, other=0.0))
    scores = tl.load(scores_ptr + beam) + (own - log_sum_exp)
    keys = tl.where(exists & (scores == scores), _ordered(scores), _NO_CHILD)
    tl.store(keys_ptr + beam * num_codes + places, keys, mask=is_place)


@triton.jit
def _trie_topk_step_select_kernel(
    keys_ptr,  # [B, W, K] int32
    nodes_ptr,  # [B, W] int64
    row_ptr,  # [M+1] int32
    edge_codes_ptr,  # [E] int32
    out_parents_ptr,  # [B, beam_width] int64 out
    out_codes_ptr,  # [B, beam_width] int64 out
    out_nodes_ptr,  # [B, beam_width] int64 out; holds places for a while
    out_scores_ptr,  # [B, beam_width] fp32 out
    num_beams,
    num_codes,
    beam_width,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, PLACES)
    keys_ptr += row * num_beams * num_codes
    keys = tl.load(keys_ptr + places, mask=places < num_beams * num_codes, other=_NO_CHILD)
    # Winners are those above the last one's key, and of those with that key the lowest places up to the width.
    last = _kth_largest(keys, beam_width, PLACES)
    room = beam_width - tl.sum((keys > last).to(tl.int32), 0)
    out_nodes_ptr += row * beam_width
    num_above, num_level = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, PLACES, CHUNK):  # read again in parts, which need fewer registers than the whole
        place = first + tl.arange(0, CHUNK)
        key = tl.load(keys_ptr + place, mask=place < num_beams * num_codes, other=_NO_CHILD)
        above = (key > last).to(tl.int32)
        level = ((key == last) & (key != _NO_CHILD)).to(tl.int32)
        counts = above + (level << 16)  # both in one running sum
        until = tl.cumsum(counts, 0)
        above_before = num_above + ((until - counts) & 0xFFFF)
        level_before = num_level + ((until - counts) >> 16)
        wins = (above != 0) | ((level != 0) & (level_before < room))
        slots = above_before + tl.minimum(level_before, room)
        tl.store(out_nodes_ptr + slots, place.to(tl.int64), mask=wins)
        in_chunk = tl.sum(counts, 0)
        num_above += in_chunk & 0xFFFF
        num_level += in_chunk >> 16
    num_winners = num_above + tl.minimum(num_level, room)
    tl.debug_barrier()  # the places are read below by other threads of this program

    for first_slot in range(0, beam_width, SLOTS):
        slot = first_slot + tl.arange(0, SLOTS)
        is_winner = slot < num_winners
        winner = tl.load(out_nodes_ptr + slot, mask=is_winner, other=0).to(tl.int32)
        tl.debug_barrier()  # several threads may hold one slot: all have read it before one of them overwrites it
        parent = winner // num_codes
        node = tl.load(nodes_ptr + row * num_beams + parent, mask=is_winner, other=0)
        edge = tl.load(row_ptr + node, mask=is_winner, other=0) + winner % num_codes
        code = tl.load(edge_codes_ptr + edge, mask=is_winner, other=0)
        winner_key = tl.load(keys_ptr + winner, mask=is_winner, other=0)
        score = tl.where(winner_key < 0, winner_key ^ 0x7FFFFFFF, winner_key).to(tl.float32, bitcast=True)
        at, exists = row * beam_width + slot, slot < beam_width
        tl.store(out_parents_ptr + at, parent.to(tl.int64), mask=exists)
        tl.store(out_codes_ptr + at, code.to(tl.int64), mask=exists)
        tl.store(out_nodes_ptr + slot, tl.where(is_winner, edge, -1).to(tl.int64), mask=exists)
        tl.store(out_scores_ptr + at, tl.where(is_winner, score, float("-inf")), mask=exists)


def supports(num_beams: int, num_codes: int) -> bool:
    """Whether a program holds the places of a row."""
    return num_beams * num_codes <= _MAX_PLACES


def _score_blocks(num_codes: int) -> dict[str, int]:
    codes = power_of_2(num_codes)
    return {"CODES": codes, "num_warps": max(1, min(8, codes // 256))}


def _select_blocks(num_places: int, beam_width: int) -> dict[str, int]:
    """32 places per thread, 8 at a time."""
    places = power_of_2(num_places)
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
    node_allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake_forward(logits, nodes, scores, row_ptr, edge_codes, beam_width, node_allowed)
    num_rows, num_beams, num_codes = logits.shape
    if num_rows > 0:
        keys = torch.empty(logits.shape, dtype=torch.int32, device=logits.device)
        allowed = nodes if node_allowed is None else node_allowed
        _trie_topk_step_score_kernel[(num_rows * num_beams,)](
            logits, nodes, scores, row_ptr, edge_codes, allowed, keys, num_beams, num_codes,
            allowed.stride(0) if allowed.dim() == 2 else 0, HAS_ALLOWED=node_allowed is not None,
            **_score_blocks(num_codes),
        )  # fmt: skip
        _trie_topk_step_select_kernel[(num_rows,)](
            keys, nodes, row_ptr, edge_codes, *outputs, num_beams, num_codes, beam_width,
            **_select_blocks(num_beams * num_codes, beam_width),
        )  # fmt: skip
    return outputs


def _fake_forward(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    beam_width: int,
    node_allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (len(logits), beam_width)
    parents, codes, children = (nodes.new_empty(shape) for _ in range(3))
    return parents, codes, children, scores.new_empty(shape)


FORWARD = define(
    "trie_topk_step(Tensor logits, Tensor nodes, Tensor scores, Tensor row_ptr, Tensor edge_codes, SymInt beam_width, "
    "Tensor? node_allowed) -> (Tensor, Tensor, Tensor, Tensor)",
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
    node_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.trie_topk_step`."""
    if node_allowed is not None:
        node_allowed = node_allowed.view(torch.uint8)
        node_allowed = node_allowed if node_allowed.stride(-1) == 1 else node_allowed.contiguous()
    return FORWARD(
        logits.contiguous(), nodes.contiguous(), scores.contiguous(), row_ptr.contiguous(), edge_codes.contiguous(),
        beam_width, node_allowed,
    )  # fmt: skip
