"""Claim: a training step of the RQ-VAE at batch 2,048 takes at most 0.25 ms on an H100.

Widths 768-512-256-128-32, three levels of 256 codes. All sides get the same batch, start weights and fused AdamW; loss,
codes and gradients are verified against the plain model first. On a GPU a sample is the mean of ten steps between two
looks at the clock, and products run in fp32, in tf32, or under bf16 autocast; our distances are fp32 in any case.

    ours, ours_compiled                  all levels in one kernel; torch.compile around it
    ours_graphed, ours_compiled_graphed  the whole step with AdamW one CUDA graph
    plain_eager, plain_compiled          level by level, as usually written; torch.compile
    plain_compiled_graphed               the whole step with AdamW one CUDA graph

    python -m benchmarks.rqvae_step
    python -m benchmarks.rqvae_step --quick     # few steps, batch 256, fp32, nothing compiled
"""

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import begin, finish, interleaved, parser, peak_memory, ratios, summarize
from benchmarks.plain_rqvae import PlainRqVae
from benchmarks.rungs import OURS, UnavailableError, reason_of
from modules.rqvae import RqVae, RqVaeConfig
from ops.graphs import GraphedCall
from training.cli import run_cli

WIDTH = 768
CLAIM_MS = 0.25
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3
"""Of a gradient's difference, relative to its norm."""
EQUAL_CODES = 0.999
"""Share that must be the same; the rest may be near-ties."""

Step = Callable[[], Tensor]
RUNGS = (
    OURS,
    "ours_graphed",
    "ours_compiled",
    "ours_compiled_graphed",
    "plain_eager",
    "plain_compiled",
    "plain_compiled_graphed",
)


def build_model(x: Tensor, config: RqVaeConfig) -> RqVae:
    """A model whose codebooks lie near the means of the batch's latents: at the means they would have no gradient."""
    torch.manual_seed(0)
    model = RqVae(config).to(x.device)
    model.initialize_codebooks_(x)
    with torch.no_grad():
        for codebook in model.codebooks():
            codebook.add_(0.1 * codebook.std() * torch.randn_like(codebook))
    return model.train()


def build_batch(batch_size: int, width: int, device: str) -> Tensor:
    """[batch_size, width] features of unit length."""
    x = torch.randn(batch_size, width, generator=torch.Generator().manual_seed(0))
    return F.normalize(x, dim=1).to(device)


def verify(model: RqVae, x: Tensor) -> None:
    """Stop unless our loss, codes and gradients are those of the plain model with the same weights.

    Raises:
        AssertionError: if they differ, so that no time is reported.
    """
    plain = PlainRqVae(model)
    output = model(x)
    own_codes = plain(x)[1]
    share = float((output.codes == own_codes).float().mean())
    if share < EQUAL_CODES:
        raise AssertionError(f"only {share:.2%} of the codes are those of the plain model; nothing is reported.")
    loss = plain(x, output.codes)[0]  # a near-tie must not pass for a wrong gradient
    torch.testing.assert_close(output.loss, loss, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    parameters = plain.counterparts(model)
    for index, (ours, theirs) in enumerate(zip(torch.autograd.grad(output.loss, parameters), expected, strict=True)):
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not error <= GRADIENT_TOLERANCE:
            raise AssertionError(
                f"gradient {index} differs from the plain model's by {error:.1e}; nothing is reported."
            )
    print(f"verified: loss, {share:.3%} of codes and {len(parameters)} gradients equal those of the plain model")


def build_step(name: str, model: RqVae, x: Tensor, *, bf16: bool) -> Step:
    """Forward, backward and optimizer step of one contender on a copy of the model.

    Raises:
        UnavailableError: if it cannot run here.
    """
    graphed = name.endswith("_graphed")
    if graphed and not x.is_cuda:
        raise UnavailableError("CUDA graphs need a GPU")
    network: nn.Module = copy.deepcopy(model) if name.startswith(OURS) else PlainRqVae(model)
    if "_compiled" in name:
        network.compile(dynamic=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True, capturable=graphed)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            loss = network(batch)[0]
        loss.backward()
        optimizer.step()
        return loss.detach()

    if not graphed:
        return lambda: step(x)
    call = GraphedCall(step, device=x.device, name="benchmark of the RQ-VAE", memory=list(network.parameters()))
    for _ in range(3):
        call(x)
    if call.num_recorded == 0:
        raise UnavailableError("the step could not be recorded")
    return lambda: call(x)


def run(case: str, model: RqVae, x: Tensor, names: Sequence[str], repeats: int, *, bf16: bool) -> list[dict[str, Any]]:
    """Result rows of one precision."""
    device, steps, rows = x.device.type, {}, {}
    for name in names:
        row: dict[str, Any] = {"case": case, "implementation": name}
        try:
            with peak_memory(row, device):
                steps[name] = build_step(name, model, x, bf16=bf16)
                row["loss"] = round(float(steps[name]()), 4)
        except Exception as error:  # a baseline that fails is a result too; ours must not fail
            if name == OURS:
                raise
            row["note"] = f"n/a: {reason_of(error)}"
        rows[name] = row
    seconds = interleaved(steps, repeats=repeats, device=device, calls=10 if device == "cuda" else 1)
    for name, values in seconds.items():
        rows[name] |= summarize(values)
    for name, ratio in ratios(list(rows.values()), of=OURS).items():
        rows[name]["times_ours"] = ratio
    return list(rows.values())


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device = begin(arguments)
    x = build_batch(256 if arguments.quick else 2048, WIDTH, device)
    model = build_model(x, RqVaeConfig(input_dim=WIDTH))
    verify(model, x)
    names = [name for name in RUNGS if not (arguments.quick and "compiled" in name)]
    rows = []
    precisions = ["fp32", "tf32", "bf16 autocast"] if device == "cuda" and not arguments.quick else ["fp32"]
    for precision in precisions:
        torch.compiler.reset()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        case = f"batch {len(x):,}, {precision}"
        rows += run(case, model, x, names, 5 if arguments.quick else 30, bf16=precision == "bf16 autocast")
    if device == "cuda":
        fastest = min(row["median_ms"] for row in rows if row["implementation"].startswith(OURS) and "median_ms" in row)
        print(f"claim: at most {CLAIM_MS} ms; fastest of ours: {fastest:.3f} ms")
    finish("rqvae_step", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
