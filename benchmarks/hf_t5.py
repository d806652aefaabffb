"""Hugging Face T5 as baseline and oracle: the sizes, tokens and start weights of our model."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from data.schemas import TokenizedSeqBatch
from modules.model import EncoderDecoderRetrievalModel
from ops.reference.jagged_to_padded import jagged_to_padded, row_mask


def has_transformers() -> bool:
    """Whether there is a T5 to compare with."""
    return importlib.util.find_spec("transformers") is not None


def build_t5(model: EncoderDecoderRetrievalModel, attention: str) -> Any:
    """A T5ForConditionalGeneration that computes what `model` computes, with a copy of its weights.

    Our BOS is T5's decoder start and padding token. T5's one head over all tokens holds our heads' rows at their
    level's tokens; rows of other tokens are drawn like ours.

    Args:
        model: the model to copy.
        attention: "eager" or "sdpa".
    """
    from transformers import T5Config, T5ForConditionalGeneration

    config = model.config
    options: dict[str, Any] = {"tie_word_embeddings": False, "attn_implementation": attention}
    options |= {"decoder_start_token_id": model.vocabulary.bos, "use_cache": False}
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=model.vocabulary.num_tokens,
            d_model=config.d_model,
            d_kv=config.head_dim,
            d_ff=config.d_ff,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_max_distance,
            dropout_rate=config.dropout,
            feed_forward_proj="relu",
            pad_token_id=model.vocabulary.bos,
            eos_token_id=None,
            **options,
        )
    )
    with torch.no_grad():
        _copy_weights(model, t5)
    return t5


def _copy_weights(model: Any, t5: Any) -> None:
    t5.shared.weight.copy_(model.embedding.weight)
    # Some versions tie the head to the token table whatever the config says; ours are separate.
    head = torch.randn(t5.shared.weight.shape, generator=torch.Generator().manual_seed(0)) * model.config.d_model**-0.5
    t5.lm_head.weight, t5.config.scale_decoder_outputs = nn.Parameter(head), False
    for level, linear in enumerate(model.heads[model.language]):
        first = model.vocabulary.offset(model.language, level)
        head[first : first + linear.out_features].copy_(linear.weight)
    for stack, t5_stack in ((model.encoder, t5.encoder), (model.decoder, t5.decoder)):
        bias = t5_stack.block[0].layer[0].SelfAttention.relative_attention_bias
        bias.weight.copy_(stack.bias.table)
        t5_stack.final_layer_norm.weight.copy_(stack.final_norm.add_norm.weight)
        for index, (layer, block) in enumerate(zip(stack.layers, t5_stack.block, strict=True)):
            parts = list(block.layer)
            _copy_self_attention(layer, parts[0])
            if len(parts) == 3:
                _copy_cross_attention(layer, model.decoder.cross_kv[index], parts[1])
            parts[-1].layer_norm.weight.copy_(layer.feed_forward_norm.weight)
            parts[-1].DenseReluDense.wi.weight.copy_(layer.feed_forward.w_in)
            parts[-1].DenseReluDense.wo.weight.copy_(layer.feed_forward.w_out)


def _copy_self_attention(layer: Any, part: Any) -> None:
    """T5 does not scale scores, so its queries carry our scale."""
    q, k, v = layer.attention.qkv.weight.chunk(3)
    attention = part.SelfAttention
    for linear, weight in ((attention.q, q * layer.attention.scale), (attention.k, k), (attention.v, v)):
        linear.weight.copy_(weight)
    attention.o.weight.copy_(layer.attention.out.weight)
    part.layer_norm.weight.copy_(layer.attention_norm.weight)


def _copy_cross_attention(layer: Any, cross_kv: Tensor, part: Any) -> None:
    k, v = cross_kv.chunk(2)
    ours, attention = layer.cross_attention, part.EncDecAttention
    for linear, weight in ((attention.q, ours.query.weight * ours.scale), (attention.k, k), (attention.v, v)):
        linear.weight.copy_(weight)
    attention.o.weight.copy_(ours.out.weight)
    part.layer_norm.weight.copy_(layer.cross_attention_norm.weight)


def t5_inputs(
    batch: TokenizedSeqBatch, model: EncoderDecoderRetrievalModel, longest: int | None = None
) -> dict[str, Tensor]:
    """The batch as T5 takes it, with the target's tokens as labels (no end token).

    Args:
        batch: with targets.
        model: knows the tokens.
        longest: pad to that many tokens; None pads to the batch's longest row.
    """
    assert batch.target_codes is not None
    level_offsets = batch.target_codes.new_tensor(model.vocabulary.level_offsets(model.language))
    return {**t5_encoder_inputs(batch, model, longest), "labels": batch.target_codes + level_offsets}


def t5_encoder_inputs(
    batch: TokenizedSeqBatch, model: EncoderDecoderRetrievalModel, longest: int | None = None
) -> dict[str, Tensor]:
    """The histories alone, as `t5_inputs` gives them."""
    if longest is None:
        longest = int(batch.offsets.diff().max())
    return {
        "input_ids": jagged_to_padded(batch.tokens, batch.offsets, longest, model.vocabulary.bos),
        "attention_mask": row_mask(batch.offsets, longest).long(),
    }


def t5_level_losses(logits: Tensor, batch: TokenizedSeqBatch, model: EncoderDecoderRetrievalModel) -> Tensor:
    """[B, L] cross-entropies over each level's own codes, from T5's logits [B, L, num_tokens]."""
    assert batch.target_codes is not None
    losses = []
    for level in range(model.num_levels):
        first = model.vocabulary.offset(model.language, level)
        own = logits[:, level, first : first + model.vocabulary.size(model.language, level)]
        losses.append(torch.nn.functional.cross_entropy(own, batch.target_codes[:, level], reduction="none"))
    return torch.stack(losses, dim=1)
