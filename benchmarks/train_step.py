"""Claim: a training step of the packed model is several times as fast as Hugging Face T5's, in half the memory.

On two CPU threads, batch 256, fp32, against the fastest padded T5 rung: at least 3.5 times at d_model 128 and 2.5 times
at 384, peak memory at most half. On an H100: at most 1.2 ms and 2.5 ms a step, at least 6 times eager T5 and 2 times
compiled and graphed T5.

All sides get the same batches, targets, threads, dropout, start weights and fused AdamW; T5 is padded to the batch's
longest row, graphed T5 to the longest row of all. Lengths are those of real histories (Amazon Beauty, every prefix,
last 20 items); codes are random. Our time includes building and tokenizing the batch, T5's inputs are ready and padded.
Losses and a gradient are verified against T5's first. On a GPU a sample is the mean of ten steps between two looks at
the clock, since a training loop does not wait for the device at every step.

    ours                                 eager
    ours_graphed                         the whole step one CUDA graph per capacity
    ours_compiled                        torch.compile, batches of one capacity
    hf_t5_eager, hf_t5_sdpa              Hugging Face's two attentions
    hf_t5_compiled                       torch.compile (dynamic shapes on a CPU), SDPA
    hf_t5_reduce_overhead                fixed length, torch.compile with its own CUDA graphs; AdamW outside
    hf_t5_graphed                        fixed length, compiled, and the whole step with AdamW one CUDA graph

    python -m benchmarks.train_step
    python -m benchmarks.train_step --quick              # few steps, batch 64, fp32, d_model 128, nothing compiled
    python -m benchmarks.train_step --lengths FOLDER     # of a prepared data set, or of sequential_data.txt
"""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import ops
from benchmarks.common import begin, finish, interleaved, measure, parser, peak_memory, summarize, write_result
from benchmarks.hf_t5 import build_t5, has_transformers, t5_inputs, t5_level_losses
from benchmarks.histories import (
    LEVEL_SIZES,
    MAX_HISTORY,
    add_lengths_argument,
    build_batches,
    build_tokenizer,
    read_lengths,
)
from benchmarks.rungs import UnavailableError, reason_of
from data.batching import TrainingBatches
from data.schemas import TokenizedSeqBatch
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer
from ops.graphs import GraphedCall
from training.cli import run_cli

TOLERANCE = 2e-4
LONGEST = MAX_HISTORY * len(LEVEL_SIZES) + 1
"""Tokens of the longest history."""
MAX_STEPS = 300
"""More than any contender takes."""

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """What all contenders share.

    Attributes:
        model: whose weights all start from.
        tokenizer, batches: of the training data.
        fixed: the same batches in few capacities.
        device: "cpu" or "cuda".
        bf16: autocast.
    """

    model: EncoderDecoderRetrievalModel
    tokenizer: SequenceTokenizer
    batches: TrainingBatches
    fixed: TrainingBatches
    device: str
    bf16: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """Of the forward pass."""
        return torch.autocast(self.device, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def tokens(self, step: int) -> TokenizedSeqBatch:
        """The batch of a step as the model reads it."""
        return self.tokenizer(self.batches.batch(step))


class Contender:
    """One network with its optimizer.

    Args:
        network: trained in place.
        loss: of what `step` is given.
        setting: device and precision.
        graphed: the step will be recorded.
    """

    def __init__(
        self, network: nn.Module, loss: Callable[[Any], Tensor], setting: Setting, *, graphed: bool = False
    ) -> None:
        self.network = network.train()
        self._loss = loss
        self._autocast = setting.autocast
        on_gpu = setting.device.startswith("cuda")
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True, capturable=graphed and on_gpu)

    def step(self, batch: Any) -> Tensor:
        """Forward, backward and optimizer step; the loss per level stays on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_mb(self) -> float:
        """Weights, buffers and optimizer state."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor)) / 2**20


@dataclass(frozen=True)
class Rung:
    """A contender and how it takes a step: `ready(step)` does what is not timed and returns what is."""

    contender: Contender
    ready: Callable[[int], Run]


def ours(setting: Setting) -> Rung:
    """The packed model; building and tokenizing the batch is timed."""
    contender = _contender(setting, _copy_of(setting.model))
    return Rung(contender, lambda step: lambda: contender.step(setting.tokens(step)))


def ours_compiled(setting: Setting) -> Rung:
    """The packed model through torch.compile, in batches of one capacity: other numbers of tokens compile anew."""
    model = _copy_of(setting.model)
    model.compile(dynamic=False)
    contender = _contender(setting, model)
    capacity = max(len(setting.batches.batch(step).item_ids) for step in range(MAX_STEPS))

    def tokens(step: int) -> TokenizedSeqBatch:
        batch = replace(setting.batches.batch(step), max_len=MAX_HISTORY)
        return setting.tokenizer(batch.to_capacity(num_rows=len(batch), num_items=capacity))

    return Rung(contender, lambda step: lambda: contender.step(tokens(step)))


def _contender(setting: Setting, model: EncoderDecoderRetrievalModel) -> Contender:
    return Contender(model, lambda batch: model(batch)["loss"] / model.num_levels, setting)


def ours_graphed(setting: Setting) -> Rung:
    """The packed model in batches of few capacities, each recorded from gathering the items to the optimizer."""
    _require_gpu(setting)
    model = _copy_of(setting.model)

    def loss(examples: Any) -> Tensor:
        return model(setting.tokenizer(setting.fixed.pack(examples)))["loss"] / model.num_levels

    contender = Contender(model, loss, setting, graphed=True)
    call = _recorded(contender, "benchmark of ours")
    return Rung(contender, lambda step: lambda: call(setting.fixed.draw(step)))


def hf_t5_eager(setting: Setting) -> Rung:
    """Hugging Face's own attention."""
    return _t5(setting, "eager")


def hf_t5_sdpa(setting: Setting) -> Rung:
    """PyTorch's attention."""
    return _t5(setting, "sdpa")


def hf_t5_compiled(setting: Setting) -> Rung:
    """Through torch.compile."""
    return _t5(setting, "sdpa", compile_options={"dynamic": True if setting.device == "cpu" else None})


def hf_t5_reduce_overhead(setting: Setting) -> Rung:
    """Fixed length; torch.compile records forward and backward."""
    _require_gpu(setting)
    options = {"mode": "reduce-overhead", "dynamic": False}
    rung = _t5(setting, "sdpa", compile_options=options, longest=LONGEST)

    def ready(step: int) -> Run:
        run = rung.ready(step)

        def marked() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return run().clone()

        return marked

    return Rung(rung.contender, ready)


def hf_t5_graphed(setting: Setting) -> Rung:
    """Fixed length, compiled; the whole step is recorded."""
    _require_gpu(setting)
    rung = _t5(setting, "sdpa", compile_options={"dynamic": False}, longest=LONGEST, graphed=True)
    call = _recorded(rung.contender, "benchmark of T5")

    def ready(step: int) -> Run:
        inputs = T5Batch(**t5_inputs(setting.tokens(step), setting.model, LONGEST))
        return lambda: call(inputs)

    return Rung(rung.contender, ready)


@dataclass(frozen=True, eq=False)
class T5Batch:
    """T5's inputs by name."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def _t5(
    setting: Setting,
    attention: str,
    *,
    compile_options: dict[str, Any] | None = None,
    longest: int | None = None,
    graphed: bool = False,
) -> Rung:
    t5 = build_t5(setting.model, attention).to(setting.device)
    if compile_options is not None:
        t5.compile(**compile_options)
    contender = Contender(t5, lambda batch: t5(**vars(batch)).loss, setting, graphed=graphed)

    def ready(step: int) -> Run:
        inputs = T5Batch(**t5_inputs(setting.tokens(step), setting.model, longest))
        return lambda: contender.step(inputs)

    return Rung(contender, ready)


def _recorded(contender: Contender, name: str) -> Callable[[Any], Tensor]:
    """The contender's step as a graph; what it returns is a copy, for the next replay overwrites the loss."""
    memory = list(contender.network.parameters())
    call = GraphedCall(contender.step, device=memory[0].device, name=name, memory=memory)

    def run(batch: Any) -> Tensor:
        loss = call(batch).clone()
        if not call.records:
            raise UnavailableError("recording failed, see the log")
        return loss

    return run


def _require_gpu(setting: Setting) -> None:
    if not setting.device.startswith("cuda"):
        raise UnavailableError("CUDA graphs need a GPU")


def _copy_of(model: EncoderDecoderRetrievalModel) -> EncoderDecoderRetrievalModel:
    copy = EncoderDecoderRetrievalModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(next(model.parameters()).device)


RUNGS = {
    function.__name__: function
    for function in (
        ours,
        ours_graphed,
        ours_compiled,
        hf_t5_eager,
        hf_t5_sdpa,
        hf_t5_compiled,
        hf_t5_reduce_overhead,
        hf_t5_graphed,
    )
}
QUICK = ("ours", "ours_graphed", "hf_t5_eager", "hf_t5_sdpa")


def build_setting(d_model: int, batch_size: int, lengths: Any, *, device: str, bf16: bool) -> Setting:
    """Model, data and precision."""
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(RetrievalModelConfig(languages={"text": LEVEL_SIZES}, d_model=d_model))
    tokenizer = build_tokenizer(model.config, device)
    batches, fixed = (
        build_batches(lengths, batch_size, device=device, fixed_capacity=fixed) for fixed in (False, True)
    )
    return Setting(model.to(device), tokenizer, batches, fixed, device, bf16)


def verify(setting: Setting) -> None:
    """Stop unless our per-row losses and a gradient equal those of padded T5 with the same weights, dropout off.

    Without the transformers package, those of the reference ops.

    Raises:
        AssertionError: if they differ.
    """
    model, batch = setting.model.eval(), setting.tokens(0)
    got = -model.log_likelihood(batch)
    if has_transformers():
        oracle, t5 = "padded T5", build_t5(model, "eager").to(setting.device).eval()
        expected, table = t5_level_losses(t5(**t5_inputs(batch, model)).logits, batch, model).sum(1), t5.shared.weight
    else:
        oracle, table = "the reference ops (transformers is not installed)", model.embedding.weight
        with ops.use_backend("torch"):
            expected = -model.log_likelihood(batch)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), [table])
    (gradient,) = torch.autograd.grad(got.mean(), [model.embedding.weight])
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    if not error <= 1e-3:
        raise AssertionError(f"the token table's gradient differs from {oracle}'s by {error:.1e}; nothing is reported.")
    print(f"verified: losses of {len(batch)} rows and the token table's gradient equal those of {oracle}")


def peak_mb(build: Callable[[Setting], Rung], setting: Setting) -> float | None:
    """Peak memory of training, weights, gradients and optimizer state included, while no other contender lives.

    On a GPU from before the contender is built, so that recordings and compiled kernels' buffers count; on a CPU,
    where a compiler would count as well, state plus growth of the process during a step.
    """
    result: dict[str, Any] = {}
    if setting.device.startswith("cuda"):
        with peak_memory(result, setting.device):
            rung = build(setting)
            for step in range(20):  # some capacity comes a third time, which records it
                rung.ready(step)()
        return result["peak_mb"]
    rung = build(setting)
    rung.ready(0)()
    rung.contender.optimizer.zero_grad(set_to_none=True)
    run = rung.ready(0)
    with peak_memory(result):
        run()
    return round(result["peak_mb"] + rung.contender.state_mb(), 1) if result else None


def time_steps(
    rungs: Mapping[str, Rung], device: str, num_samples: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step of every contender in turn over the same batches, and losses, after some steps of warm-up."""
    on_gpu = device.startswith("cuda")
    calls, warmup = (10, 60) if on_gpu else (1, 2)
    losses: dict[str, list[Tensor]] = {name: [] for name in rungs}
    seconds: dict[str, list[float]] = {name: [] for name in rungs}
    first = 0
    for sample in range(-1, num_samples):
        count = warmup if sample < 0 else calls
        for name, rung in rungs.items():
            runs = iter([rung.ready(step) for step in range(first, first + count)])
            times = measure(
                lambda runs=runs, name=name: losses[name].append(next(runs)()),  # type: ignore[misc]
                repeats=1,
                warmup=0,
                device=device,
                calls=count,
            )
            seconds[name] += times if sample >= 0 else []
        first += count
    return seconds, {name: [float(loss) for loss in values] for name, values in losses.items()}


def run(case: str, setting: Setting, names: Sequence[str], *, num_samples: int) -> list[dict[str, Any]]:
    """Result rows of one size and precision."""
    verify(setting)
    rungs, memory, notes = {}, {}, {}
    for name in names:
        try:
            memory[name] = peak_mb(RUNGS[name], setting)
            gc.collect()
        except Exception as error:  # a contender that cannot run is a result too; ours must
            if name == "ours":
                raise
            notes[name] = reason_of(error)
    for name in memory:
        torch.manual_seed(0)
        rungs[name] = RUNGS[name](setting)
    seconds, losses = time_steps(rungs, setting.device, num_samples)
    batching = interleaved({"batching": lambda: setting.tokens(0)}, repeats=num_samples, device=setting.device)
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        row: dict[str, Any] = {"case": case, "implementation": name, **summarize(values), "peak_mb": memory[name]}
        row |= {"loss_first": round(losses[name][0], 3), "loss_last": round(losses[name][-1], 3)}
        if name == "ours":
            row["batching_share"] = round(summarize(batching["batching"])["median_ms"] / row["median_ms"], 4)
        rows.append(row)
    add_ratios(rows)
    return rows + [{"case": case, "implementation": name, "note": f"n/a: {note}"} for name, note in notes.items()]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Speed of every row against the fastest T5 rung and each T5 rung; ours' memory against the smallest T5 rung's."""
    baselines = {row["implementation"]: row for row in rows if row["implementation"].startswith("hf_t5")}
    if not baselines:
        return
    fastest = min(row["median_ms"] for row in baselines.values())
    smallest = min((row["peak_mb"] for row in baselines.values() if row["peak_mb"]), default=None)
    for row in rows:
        row["speed_vs_fastest_hf"] = round(fastest / row["median_ms"], 2)
        if row["implementation"].startswith("ours"):
            row |= {f"vs_{name}": round(base["median_ms"] / row["median_ms"], 2) for name, base in baselines.items()}
            if smallest and row["peak_mb"]:
                row["memory_vs_smallest_hf"] = round(row["peak_mb"] / smallest, 3)


def main(argv: Sequence[str]) -> int:
    """Parse, verify, measure, write."""
    arguments_of = parser(__doc__)
    add_lengths_argument(arguments_of)
    arguments_of.add_argument("--batch-size", type=int, help="default: 256; quick: 64")
    arguments_of.add_argument("--d-model", type=int, nargs="+", help="default: 128 384")
    arguments_of.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="bf16 is autocast; default: both")
    arguments_of.add_argument("--rungs", nargs="+", choices=list(RUNGS), help="default: all")
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    lengths, source = read_lengths(arguments.lengths)
    quick = arguments.quick
    batch_size = arguments.batch_size or (64 if quick else 256)
    names = arguments.rungs or (QUICK if quick else list(RUNGS))
    rows = []
    for d_model in arguments.d_model or ([128] if quick else [128, 384]):
        for dtype in arguments.dtypes or (["fp32"] if quick else ["fp32", "bf16"]):
            torch.compiler.reset()
            setting = build_setting(d_model, batch_size, lengths, device=device, bf16=dtype == "bf16")
            place = f"{arguments.threads} threads" if device == "cpu" else "GPU"
            case = f"{source}, batch {batch_size}, d_model {d_model}, {place}, {dtype}"
            rows += run(case, setting, names, num_samples=3 if quick else 8 if device == "cpu" else 20)
            # Compiling all rungs takes many minutes: a run that is stopped keeps what it has.
            write_result("train_step", rows, device=device, quick=quick, results=arguments.results)
    finish("train_step", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
