"""Public ops on packed (jagged) tensors: one signature per op, checked here, computed by one of its twins.

Rows of a batch lie behind each other in [T, ...] tensors; `offsets` int32 [B+1] are their boundaries and `max_len` is a
Python int that no row exceeds. Rows may be empty. Tokens behind the last boundary belong to no row: a batch of fixed
capacity has some, attention gives zeros there and passes them no gradient.

An op runs as Triton kernels (`ops/triton`) on a CUDA device; elsewhere as PyTorch, where `ops/cpu` holds what is
faster on a processor than the plain twins in `ops/reference`. `OPS_BACKEND` and `use_backend` override that. Under
autocast, products take the autocast dtype; norms, softmax, distances and losses compute in fp32. Ops with `dropout_p`
take an optional `seed` ([1] int64): the same seed drops the same elements on every backend.
"""

from ops.attention import beam_cross_attention, beam_self_attention, jagged_attention, jagged_self_attention
from ops.backend import describe_backend, use_backend
from ops.codes import LeafFilter, TrieLevel, build_trie, codebook_stats, residual_quantize, trie_topk_step
from ops.graphs import GraphedCall
from ops.jagged import (
    jagged_concat,
    jagged_mean,
    jagged_softmax,
    jagged_split,
    jagged_sum,
    jagged_to_padded,
    padded_to_jagged,
)
from ops.layers import add_rms_norm, dropout, relu_feed_forward, semantic_id_embedding
from ops.losses import catalogue_cross_entropy, cross_entropy_small_vocab
from ops.reference.relative_buckets import relative_buckets
from ops.seeds import dropout_seeds
from ops.silu_attention import jagged_silu_attention

__all__ = [
    "GraphedCall",
    "LeafFilter",
    "TrieLevel",
    "add_rms_norm",
    "beam_cross_attention",
    "beam_self_attention",
    "build_trie",
    "catalogue_cross_entropy",
    "codebook_stats",
    "cross_entropy_small_vocab",
    "describe_backend",
    "dropout",
    "dropout_seeds",
    "jagged_attention",
    "jagged_concat",
    "jagged_mean",
    "jagged_self_attention",
    "jagged_silu_attention",
    "jagged_softmax",
    "jagged_split",
    "jagged_sum",
    "jagged_to_padded",
    "padded_to_jagged",
    "relative_buckets",
    "relu_feed_forward",
    "residual_quantize",
    "semantic_id_embedding",
    "trie_topk_step",
    "use_backend",
]
