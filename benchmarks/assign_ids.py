"""Claim: ids of 10 million 768-wide fp16 vectors in an H100's memory in at most 60 ms.

The encoder runs in fp16, distances in fp32. On a CPU there are fewer vectors and the encoder runs in fp32; times per
million vectors compare. Verified first, on a part of the vectors: the share with the ids of double precision is
reported, and every difference must be a near-tie. How near is the gap between the double-precision distances of the
two codes at the first level where they differ, relative to the squared lengths of residual and code; it is bounded
both for the distances alone (double precision on the same latents) and with the encoder (all in double precision).

On a CPU there is one case more: memory stays flat while fp16 vectors of files of up to 10 million rows, read and never
held, get their codes in shards, see `benchmarks.assigned_files`. It takes 8.5 GB of the temporary folder.

    ours, ours_tf32x3     one kernel for all levels, in exact fp32 or on tensor cores in three passes
    plain_eager           torch.cdist and argmin, level by level, with the same encoder and blocks
    reference             our code with the PyTorch twin of the kernel (a GPU only; elsewhere it is ours)

    python -m benchmarks.assign_ids
    python -m benchmarks.assign_ids --quick     # 20,000 vectors on a CPU, 200,000 on a GPU; files of up to 80,000
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.assigned_files import run_files
from benchmarks.common import begin, finish, interleaved, parser, peak_memory, ratios, summarize
from benchmarks.plain_rqvae import PlainRqVae
from benchmarks.rungs import OURS
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.assign import BLOCK_ROWS, assign_codes
from training.cli import run_cli

WIDTH = 768
CLAIM_MS = 60
VERIFIED = 100_000
FILE_WIDTH = 384
FILE_LENGTHS = (1_000_000, 3_000_000, 10_000_000)
ROWS_PER_SHARD = 100_000
DISTANCE_GAP = 5e-6
"""Largest gap that rounding of fp32 distances explains."""
ENCODER_GAP = {torch.float32: 5e-5, torch.float16: 2e-3}
"""Largest gap that rounding inside the encoder explains."""


def build_features(num_rows: int, width: int, device: str) -> Tensor:
    """[num_rows, width] of unit length on the device, fp16 on a GPU, made in blocks."""
    features = torch.empty(num_rows, width, dtype=torch.float16 if device == "cuda" else torch.float32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for block in features.split(BLOCK_ROWS[device]):
        block.copy_(F.normalize(torch.randn(block.shape, generator=generator, device=device), dim=1))
    return features


def build_model(features: Tensor, config: RqVaeConfig) -> RqVae:
    """A model whose codebooks are the means of some vectors' latents."""
    torch.manual_seed(0)
    model = RqVae(config).to(features.device)
    model.initialize_codebooks_(features[:20_000].float())
    return model.eval().requires_grad_(False)


def agreement(codes: Tensor, latent: Tensor, codebooks: Sequence[Tensor]) -> tuple[float, float]:
    """How codes [B, L] compare with those of double precision.

    Args:
        codes: to compare.
        latent: [B, D] fp64.
        codebooks: [K_l, D] fp64 each.

    Returns:
        Share of rows whose codes are all equal, and the largest gap at a first difference.
    """
    exact, _ = ops.residual_quantize(latent, codebooks)
    equal, largest = torch.ones(len(codes), dtype=torch.bool, device=codes.device), 0.0
    for level, codebook in enumerate(codebooks):
        first = (equal & (codes[:, level] != exact[:, level])).nonzero()[:, 0]
        pair = codebook[torch.stack([codes[first, level], exact[first, level]])]
        ours, nearest = (latent[first] - pair).square().sum(dim=-1)
        scale = latent[first].square().sum(dim=-1) + pair.square().sum(dim=-1).amax(dim=0)
        largest = max(largest, *((ours - nearest) / scale).tolist(), 0.0)
        equal[first] = False
        latent = latent - codebook[exact[:, level]]
    return float(equal.double().mean()), largest


def verify(
    name: str, assign: Callable[[Tensor], Tensor], model: RqVae, features: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Agreement with double precision, for the result.

    Raises:
        AssertionError: if ours differs by more than a near-tie, so that no time is reported.
    """
    part = features[:VERIFIED]
    double = copy.deepcopy(model).double()
    codebooks = double.codebooks()
    codes = assign(part)
    found: dict[str, float] = {}
    blocks = part.split(BLOCK_ROWS[part.device.type])
    latents = torch.cat([_encode(model, block, dtype).double() for block in blocks])
    exact_latents = torch.cat([double.encode(block.double()) for block in blocks])
    for kind, latent, bound in (
        ("distances", latents, DISTANCE_GAP),
        ("encoder", exact_latents, ENCODER_GAP[dtype]),
    ):
        share, gap = agreement(codes, latent, codebooks)
        found |= {f"equal_{kind}": round(share, 6), f"gap_{kind}_ppm": round(gap * 1e6, 3)}
        found[f"bound_{kind}_ppm"] = round(bound * 1e6, 3)
        if name.startswith(OURS) and not gap <= bound:
            raise AssertionError(f"{name} differs from double precision by {gap:.1e}; nothing is reported.")
    return found


def _encode(model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents of a block, filled up as `assign_codes` fills it, in the encoder's precision."""
    full = F.pad(x, (0, 0, 0, BLOCK_ROWS[x.device.type] - len(x)))
    with torch.no_grad(), torch.autocast(x.device.type, dtype=dtype, enabled=dtype == torch.float16):
        return model.encode(full if dtype == torch.float16 else full.float())[: len(x)]


def contenders(model: RqVae, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """What assigns codes [N, L] to features [N, width], by name."""
    plain, on_gpu = PlainRqVae(model), next(model.parameters()).is_cuda

    def plain_eager(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, dtype=dtype, enabled=dtype == torch.float16):
            return torch.cat([plain.semantic_ids(block) for block in features.split(BLOCK_ROWS[features.device.type])])

    def reference(features: Tensor) -> Tensor:
        with ops.use_backend("torch"):
            return assign_codes(model, features, encoder_dtype=dtype)

    found: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda features: assign_codes(model, features, encoder_dtype=dtype),
        "plain_eager": plain_eager,
    }
    if on_gpu:
        found["ours_tf32x3"] = lambda features: assign_codes(model, features, encoder_dtype=dtype, precision="tf32x3")
        found["reference"] = reference
    return found


def run(model: RqVae, features: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Result rows of all contenders."""
    device = features.device.type
    dtype = torch.float16 if device == "cuda" else torch.float32
    runs: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    case = f"{len(features):,} x {features.shape[1]}, {str(dtype).removeprefix('torch.')} encoder"
    for name, assign in contenders(model, dtype).items():
        agrees = verify(name, assign, model, features, dtype)
        rows[name] = {"case": case, "implementation": name, **agrees}
        runs[name] = partial(assign, features)
        with peak_memory(rows[name], device):
            runs[name]()
    for name, seconds in interleaved(runs, repeats=repeats, warmup=1, device=device).items():
        rows[name] |= summarize(seconds)
        rows[name]["ms_per_million"] = round(rows[name]["median_ms"] / len(features) * 1e6, 3)
    for name, ratio in ratios(list(rows.values()), of=OURS).items():
        rows[name]["times_ours"] = ratio
    return list(rows.values())


def files(*, quick: bool) -> list[dict[str, Any]]:
    """Result rows of vectors that are read from files."""
    shrink = 125 if quick else 1
    features = build_features(20_000, FILE_WIDTH, "cpu")
    model = build_model(features, RqVaeConfig(input_dim=FILE_WIDTH))
    verify(OURS, contenders(model, torch.float32)[OURS], model, features.half(), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        lengths = tuple(length // shrink for length in FILE_LENGTHS)
        return run_files(model, lengths, ROWS_PER_SHARD // shrink, Path(folder))


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device = begin(arguments)
    quick, full = (200_000, 10_000_000) if device == "cuda" else (20_000, 200_000)
    features = build_features(quick if arguments.quick else full, WIDTH, device)
    model = build_model(features, RqVaeConfig(input_dim=WIDTH))
    rows = run(model, features, 3 if arguments.quick else 10)
    if device == "cuda" and not arguments.quick:
        print(f"claim: at most {CLAIM_MS} ms; ours: {rows[0]['median_ms']:.1f} ms")
    if device == "cpu":
        rows += files(quick=arguments.quick)
    finish("assign_ids", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
