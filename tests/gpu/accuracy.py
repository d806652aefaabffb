"""Every op at the sizes of training and generation, for comparisons of its kernels with PyTorch.

The functions take a device and a size, so that their logic can be tried small on a CPU, in Triton's interpreter:

    TRITON_INTERPRET=1 python -m tests.gpu.accuracy
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DROPOUT = 0.1

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """Rows and widths; those of the default model on a batch of 256, or smaller ones for the interpreter."""

    rows: int = 256
    max_len: int = 81
    width: int = 128
    hidden: int = 1024
    heads: int = 6
    head_dim: int = 64
    codes: int = 256
    levels: int = 4
    beams: int = 20


TINY = Size(rows=5, max_len=19, width=24, hidden=40, heads=2, head_dim=16, codes=20, levels=3, beams=3)


@dataclass(frozen=True)
class Case:
    """An op with arguments.

    Attributes:
        call: takes the floating-point inputs by name and the others by name; returns floating-point outputs.
        inputs: fp32 on the CPU; each gets a gradient, unless the op has none.
        others: moved to the device as they are.
        keep: inputs that stay fp32, such as norm weights, also beside float64.
        gradients: whether the op has them.
        plain: what a model without this library computes, where the op's twin in PyTorch widens to fp32 inside and is
            no measure for another dtype; called like `call`.
    """

    call: Callable[..., Tensor | Outputs]
    inputs: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    gradients: bool = True
    plain: Callable[..., Tensor | Outputs] | None = None


def cases(size: Size) -> dict[str, Case]:
    """One case or more for every op, by the op's name and what is special in the case."""
    seed = {"seed": torch.tensor([0x0123456789ABCDEF])}
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(size.max_len + 1, (size.rows,), generator=generator)
    lengths[:3] = torch.tensor([size.max_len, 0, 1])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    num_tokens = int(offsets[-1]) + 7
    offsets_q = torch.arange(size.rows + 1, dtype=torch.int32) * size.levels
    num_queries = size.rows * size.levels
    rows = {"offsets": offsets}
    heads, scale = (size.heads, size.head_dim), size.head_dim**-0.5
    codes = torch.randint(size.codes, (size.rows, size.levels), generator=generator)
    level_offsets = torch.arange(size.levels) * size.codes
    slices = [(level * size.codes, (level + 1) * size.codes) for level in range(size.levels)]
    bias = randn(32, size.heads)

    def self_attention(causal: bool, length: int) -> Callable[..., Tensor]:
        return lambda qkv, bias, offsets, seed: ops.jagged_self_attention(
            qkv, offsets, max_len=length, scale=scale, bias_table=bias, causal=causal, dropout_p=DROPOUT, seed=seed
        )

    def plain_self_attention(causal: bool, length: int) -> Callable[..., Tensor]:
        def attend(qkv: Tensor, bias: Tensor, offsets: Tensor, seed: Tensor) -> Tensor:
            q, k, v = ops.jagged_to_padded(qkv, offsets, max_len=length).unbind(2)
            buckets = ops.relative_buckets(length, length, len(bias), 128, causal).to(bias.device)
            visible = _exists(offsets, length)[:, None, None, :]
            if causal:
                visible = visible & torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
            out = _plain_attention(q, k, v, visible, scale, bias[buckets].movedim(-1, 0).to(q.dtype))
            return ops.padded_to_jagged(out, offsets, num_tokens=len(qkv))

        return attend

    def plain_cross_attention(q: Tensor, kv: Tensor, offsets_q: Tensor, offsets: Tensor, seed: Tensor) -> Tensor:
        k, v = ops.jagged_to_padded(kv, offsets, max_len=size.max_len).unbind(2)
        q_rows = q.view(size.rows, size.levels, *heads)
        out = _plain_attention(q_rows, k, v, _exists(offsets, size.max_len)[:, None, None, :], scale, None)
        return out.flatten(0, 1)

    def plain_silu_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        length = size.max_len
        q, k, v = (ops.jagged_to_padded(x, offsets, max_len=length).transpose(1, 2) for x in (q, k, v))
        place = torch.arange(length, device=q.device)
        distance = place[:, None] - place
        scores = q @ k.transpose(2, 3) * scale + bias[distance.clamp(min=0)].movedim(-1, 0).to(q.dtype)
        weights = torch.nn.functional.silu(scores).masked_fill(distance < 0, 0.0)
        out = (weights @ v / length).transpose(1, 2).contiguous()
        return ops.padded_to_jagged(out, offsets, num_tokens=num_tokens)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, seed: Tensor) -> Outputs:
        return ops.add_rms_norm(x, residual, weight, dropout_p=DROPOUT, seed=seed)

    def jagged_concat(first: Tensor, second: Tensor, offsets: Tensor, offsets_q: Tensor) -> Tensor:
        return ops.jagged_concat((first, second), (offsets, offsets_q))[0]

    def jagged_split(x: Tensor, offsets: Tensor, offsets_q: Tensor) -> Outputs:
        return ops.jagged_split(x, (offsets, offsets_q), num_tokens=(num_tokens, num_queries))

    def trie_topk_step(logits: Tensor, scores: Tensor, row_ptr: Tensor, edge_codes: Tensor, nodes: Tensor) -> Tensor:
        found = ops.trie_topk_step(logits, nodes, scores, row_ptr, edge_codes, beam_width=size.beams)[3]
        return found.sort(dim=1).values

    def plain_trie_topk_step(
        logits: Tensor, scores: Tensor, row_ptr: Tensor, edge_codes: Tensor, nodes: Tensor
    ) -> Tensor:
        children = logits.log_softmax(-1)[..., edge_codes[: size.codes // 2].long()]  # of every node the same
        return (scores[..., None] + children).flatten(1).topk(size.beams).values.sort(dim=1).values

    return {
        "add_rms_norm": Case(
            add_rms_norm,
            {
                "x": randn(num_tokens, size.width),
                "residual": randn(num_tokens, size.width),
                "weight": randn(size.width),
            },
            seed,
            keep=("weight",),
        ),
        "dropout": Case(
            lambda x, seed: ops.dropout(x, dropout_p=DROPOUT, seed=seed), {"x": randn(num_tokens, size.width)}, seed
        ),
        "relu_feed_forward": Case(
            lambda x, w_in, w_out, seed: ops.relu_feed_forward(x, w_in, w_out, dropout_p=DROPOUT, seed=seed),
            {
                "x": randn(num_tokens, size.width),
                "w_in": randn(size.hidden, size.width) * size.width**-0.5,
                "w_out": randn(size.width, size.hidden) * size.hidden**-0.5,
            },
            seed,
        ),
        "semantic_id_embedding": Case(
            lambda table, positions, codes, level_offsets: ops.semantic_id_embedding(
                codes, table, level_offsets, positions=positions
            ),
            {"table": randn(size.levels * size.codes, size.width), "positions": randn(size.levels, size.width)},
            {"codes": codes, "level_offsets": level_offsets},
        ),
        "cross_entropy_small_vocab": Case(
            lambda logits, target: ops.cross_entropy_small_vocab(
                logits, target, label_smoothing=0.1, level_slice=slices
            ),
            {"logits": randn(num_queries, size.levels * size.codes)},
            {"target": codes.flatten()},
        ),
        "catalogue_cross_entropy": Case(
            lambda queries, items, target, excluded: ops.catalogue_cross_entropy(
                queries, items, target, scale=14.0, excluded=excluded
            ),
            {
                "queries": randn(num_queries, size.width) * size.width**-0.5,
                "items": randn(12 * size.hidden, size.width) * size.width**-0.5,
            },
            {"target": codes.flatten(), "excluded": torch.arange(12 * size.hidden) % 300 == 299},
        ),
        "jagged_self_attention": Case(
            self_attention(False, size.max_len),
            {"qkv": randn(num_tokens, 3, *heads), "bias": bias},
            rows | seed,
            keep=("bias",),
            plain=plain_self_attention(False, size.max_len),
        ),
        "jagged_self_attention, causal": Case(
            self_attention(True, size.levels),
            {"qkv": randn(num_queries, 3, *heads), "bias": bias},
            {"offsets": offsets_q} | seed,
            keep=("bias",),
            plain=plain_self_attention(True, size.levels),
        ),
        "jagged_attention": Case(
            lambda q, kv, offsets_q, offsets, seed: ops.jagged_attention(
                q,
                kv,
                offsets_q,
                offsets,
                max_q=size.levels,
                max_k=size.max_len,
                scale=scale,
                dropout_p=DROPOUT,
                seed=seed,
            ),
            {"q": randn(num_queries, *heads), "kv": randn(num_tokens, 2, *heads)},
            rows | {"offsets_q": offsets_q} | seed,
            plain=plain_cross_attention,
        ),
        "beam_cross_attention": Case(
            lambda q, kv, offsets: ops.beam_cross_attention(q, kv, offsets, max_k=size.max_len, scale=scale),
            {"q": randn(size.rows, size.beams, *heads), "kv": randn(num_tokens, 2, *heads)},
            rows,
            gradients=False,
        ),
        "beam_self_attention": Case(
            lambda q, cache, bias, ancestors: ops.beam_self_attention(q, cache, ancestors, scale=scale, bias=bias),
            {
                "q": randn(size.rows, size.beams, *heads),
                "cache": randn(size.levels, size.rows, size.beams, 2, *heads),
                "bias": randn(size.heads, size.levels),
            },
            {"ancestors": torch.randint(size.beams, (size.rows, size.beams, size.levels), generator=generator)},
            keep=("bias",),
            gradients=False,
        ),
        "jagged_to_padded": Case(
            lambda x, offsets: ops.jagged_to_padded(x, offsets, max_len=size.max_len),
            {"x": randn(num_tokens, size.width)},
            rows,
        ),
        "padded_to_jagged": Case(
            lambda x, offsets: ops.padded_to_jagged(x, offsets, num_tokens=num_tokens),
            {"x": randn(size.rows, size.max_len, size.width)},
            rows,
        ),
        "jagged_concat": Case(
            jagged_concat,
            {"first": randn(num_tokens, size.width), "second": randn(num_queries, size.width)},
            rows | {"offsets_q": offsets_q},
        ),
        "jagged_split": Case(
            jagged_split, {"x": randn(num_tokens + num_queries, size.width)}, rows | {"offsets_q": offsets_q}
        ),
        **{
            op.__name__: Case(
                lambda x, offsets, op=op: op(x, offsets, max_len=size.max_len), {"x": randn(num_tokens, width)}, rows
            )
            for op, width in (
                (ops.jagged_softmax, size.heads),
                (ops.jagged_sum, size.width),
                (ops.jagged_mean, size.width),
            )
        },
        "codebook_stats": Case(
            lambda x, codes: ops.codebook_stats(x, codes, size.codes)[1],
            {"x": randn(num_tokens, 32)},
            {"codes": torch.randint(size.codes, (num_tokens,), generator=generator)},
            gradients=False,
        ),
        "residual_quantize": Case(
            lambda x, first, second: ops.residual_quantize(x, (first, second))[1],
            # Few rows, so that none lies so near the middle of two codes that rounding decides.
            {"x": randn(num_queries, 32), "first": randn(size.codes, 32), "second": randn(size.codes, 32) * 0.5},
            keep=("first", "second"),
            gradients=False,
        ),
        "trie_topk_step": Case(
            trie_topk_step,
            {"logits": randn(size.rows, size.beams, size.codes), "scores": randn(size.rows, size.beams)},
            {
                "row_ptr": torch.arange(size.beams + 1, dtype=torch.int32) * (size.codes // 2),
                "edge_codes": torch.arange(0, size.codes, 2, dtype=torch.int32)[: size.codes // 2].repeat(size.beams),
                "nodes": torch.arange(size.beams).expand(size.rows, -1).contiguous(),
            },
            keep=("scores",),
            gradients=False,
            plain=plain_trie_topk_step,
        ),
        "jagged_silu_attention": Case(
            lambda q, k, v, bias, offsets: ops.jagged_silu_attention(
                q, k, v, offsets, max_len=size.max_len, scale=scale, normalizer=size.max_len, bias=bias
            ),
            {
                **{name: randn(num_tokens, *heads) for name in ("q", "k", "v")},
                "bias": randn(size.max_len, size.heads),
            },
            rows,
            keep=("bias",),
            plain=plain_silu_attention,
        ),
    }


def _exists(offsets: Tensor, length: int) -> Tensor:
    """[B, length] bool, which places of padded rows hold a token."""
    return torch.arange(length, device=offsets.device) < offsets.diff()[:, None]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """[B, L, H, D] in one dtype throughout, as a padded model without fused attention computes it."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias
    probabilities = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return (probabilities @ v).transpose(1, 2).contiguous()


WITHOUT_CASE = {
    "GraphedCall",
    "LeafFilter",
    "TrieLevel",
    "build_trie",
    "describe_backend",
    "dropout_seeds",
    "relative_buckets",
    "use_backend",
}
"""What `ops` exports and no kernel computes."""


def run(case: Case, dtype: torch.dtype, device: torch.device | str, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name, on one backend."""
    inputs = {
        name: value.to(device, torch.float32 if name in case.keep else dtype).requires_grad_(case.gradients)
        for name, value in case.inputs.items()
    }
    with ops.use_backend(backend):
        result = case.call(**inputs, **{name: value.to(device) for name, value in case.others.items()})
        outputs = result if isinstance(result, tuple) else (result,)
        found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
        if case.gradients:
            upstream = [_upstream(output, index).to(device) for index, output in enumerate(outputs)]
            gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
            found |= {f"gradient of {name}": grad for name, grad in zip(inputs, gradients, strict=True)}
    return found


def _upstream(output: Tensor, index: int) -> Tensor:
    """Incoming gradient of an output; bfloat16 holds its values, so that it is the same in every dtype."""
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)


def errors(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict[str, tuple[float, float, float]]:
    """By name: the largest error of the kernels and of PyTorch in the same dtype, against float64, and the scale."""
    rounded = {name: value if name in case.keep else value.to(dtype).double() for name, value in case.inputs.items()}
    case_of_exact = replace(case, inputs=rounded)
    exact = run(case_of_exact, torch.float64, device, "torch")
    ours, theirs, exact_of_theirs = run(case, dtype, device, "triton"), run(case, dtype, device, "torch"), exact
    if case.plain is not None:
        theirs = run(replace(case, call=case.plain), dtype, device, "torch")
        exact_of_theirs = run(replace(case_of_exact, call=case.plain), torch.float64, device, "torch")
    found = {}
    for name, value in exact.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        found[name] = (_largest(ours[name], value), _largest(theirs[name], exact_of_theirs[name]), scale)
    return found


def _largest(value: Tensor, exact: Tensor) -> float:
    difference = (value.double() - exact).abs().nan_to_num(nan=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def assert_accurate(case: Case, dtype: torch.dtype, device: torch.device | str) -> None:
    """The rule of flash-attention: at most twice PyTorch's error, plus one unit of the last place of the scale."""
    too_large = {
        name: f"error {ours:.3g}, PyTorch's {theirs:.3g}, values up to {scale:.3g}"
        for name, (ours, theirs, scale) in errors(case, dtype, device).items()
        if not ours <= 2 * theirs + torch.finfo(dtype).eps * scale
    }
    assert not too_large, too_large


def assert_deterministic(case: Case, dtype: torch.dtype, device: torch.device | str) -> None:
    """Two runs give the same bits."""
    first, second = (run(case, dtype, device, "triton") for _ in range(2))
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different, different


def main() -> None:
    """Print the errors of all cases, small, in the interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1")
    for (name, case), dtype in itertools.product(cases(TINY).items(), DTYPES):
        try:
            assert_accurate(case, dtype, "cpu")
            assert_deterministic(case, dtype, "cpu")
            verdict: Any = "ok"
        except AssertionError as error:
            verdict = error
        print(name, dtype, verdict)


if __name__ == "__main__":
    main()
