"""The one command for a GPU machine: tests of the GPU, every benchmark on it, the loss curve and a short training.

    python -m benchmarks.gpu_suite --output FOLDER --prepared PREPARED
    python -m benchmarks.gpu_suite --output FOLDER --parts attention train_step    # some parts, without prepared data
    python -m benchmarks.gpu_suite --output FOLDER --device cpu --quick            # rehearsal on a CPU

PREPARED holds `dataset` and `tokenizer`, which benchmarks/README.md tells how to make on another machine. Every part
runs in a process of its own with a time limit; one that fails or takes too long is noted, and the next one starts.
FOLDER gets logs/, results/ as in benchmarks/results, the decoder's run, and summary.json, which alone holds all
results, the ends of the logs, and which targets were met. Needs torch, numpy, scipy, gin, accelerate, einops,
safetensors and pytest; without transformers there is no comparison with T5, without matplotlib no plot.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common import REPOSITORY, commit, device_name, print_table, versions
from benchmarks.histories import NUM_ITEMS
from data.schemas import InputError
from training.cli import run_cli

Rows = list[dict[str, Any]]
Results = Mapping[str, Rows]

TIMED = (
    "attention",
    "silu_attention",
    "add_rms_norm",
    "cross_entropy",
    "catalogue_loss",
    "train_step",
    "rqvae_step",
    "assign_ids",
    "beam_search",
    "trie",
    "length_scaling",
)
WITH_LENGTHS = ("attention", "silu_attention", "add_rms_norm", "train_step", "beam_search")
NEED_DATA = ("loss_curve", "train_decoder")
PARTS = ("gpu_tests", "kernel_tests", *TIMED, *NEED_DATA)
_LOG_CHARACTERS = 4000


@dataclass
class Outcome:
    """How a part ended.

    Attributes:
        part: its name.
        status: "done", "failed (exit code)", "out of time" or "skipped: why".
        seconds: it took.
        log: the end of what it printed.
    """

    part: str
    status: str
    seconds: float = 0.0
    log: str = ""


@dataclass(frozen=True)
class Target:
    """A number that a part has to reach.

    Attributes:
        name: what is measured.
        limit: the number.
        at_most: whether less is better.
        read: the measured value; None where it was not measured.
    """

    name: str
    limit: float
    at_most: bool
    read: Callable[[Results], float | None]

    def judge(self, results: Results) -> dict[str, Any]:
        """A row of the summary."""
        value = self.read(results)
        if value is None:
            verdict = "not measured"
        else:
            verdict = "met" if (value <= self.limit if self.at_most else value >= self.limit) else "MISSED"
        wanted = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        return {"target": self.name, "wanted": wanted, "measured": "" if value is None else value, "verdict": verdict}


def step_rows(results: Results, d_model: int) -> Rows:
    """Our training steps of one size."""
    rows = results.get("train_step", [])
    return [row for row in timed(rows, "ours") if f"d_model {d_model}," in row["case"]]


def timed(rows: Rows, implementation: str) -> Rows:
    """Rows with a time whose implementation begins so."""
    return [row for row in rows if row.get("implementation", "").startswith(implementation) and "median_ms" in row]


def fastest(rows: Rows) -> dict[str, Any]:
    """The row with the shortest median; {} of none."""
    return min(rows, key=lambda row: row["median_ms"], default={})


def step_ms(d_model: int) -> Callable[[Results], float | None]:
    """Our fastest training step."""
    return lambda results: fastest(step_rows(results, d_model)).get("median_ms")


def step_ratio(d_model: int, baselines: Sequence[str]) -> Callable[[Results], float | None]:
    """How many times as fast as the faster of some T5 rungs our fastest step is, in the same dtype."""

    def read(results: Results) -> float | None:
        row = fastest(step_rows(results, d_model))
        found = [row[f"vs_{name}"] for name in baselines if f"vs_{name}" in row]
        return min(found, default=None)

    return read


def attention_ratio(direction: str, baseline: str) -> Callable[[Results], float | None]:
    """The worst case's ratio of a baseline's time to ours."""

    def read(results: Results) -> float | None:
        rows = timed(results.get("attention", []), baseline)
        return min((row["ours_faster"] for row in rows if row["pass"] == direction), default=None)

    return read


def own_ms(part: str) -> Callable[[Results], float | None]:
    """Our fastest row of a part."""
    return lambda results: fastest(timed(results.get(part, []), "ours")).get("median_ms")


def search_ms(batch: int, beam_width: int) -> Callable[[Results], float | None]:
    """Our fastest beam search in the catalogue of Beauty's size."""
    wanted = {"batch": batch, "beam_width": beam_width, "items": NUM_ITEMS}

    def read(results: Results) -> float | None:
        rows = timed(results.get("beam_search", []), "ours")
        return fastest([row for row in rows if wanted.items() <= row.items()]).get("median_ms")

    return read


def trie_step_ms(num_items: int) -> Callable[[Results], float | None]:
    """The slowest of the steps through a catalogue's trie."""

    def read(results: Results) -> float | None:
        rows = timed(results.get("trie", []), "trie_topk_step")
        return max((row["median_ms"] for row in rows if row.get("items") == num_items), default=None)

    return read


def last_value(part: str, key: str) -> Callable[[Results], float | None]:
    """A number that only one row of a part has."""

    def read(results: Results) -> float | None:
        return next((row[key] for row in results.get(part, []) if key in row), None)

    return read


GRAPHED = ("hf_t5_graphed", "hf_t5_reduce_overhead")
TARGETS = (
    Target("training step, d_model 128, ms", 1.2, True, step_ms(128)),
    Target("training step, d_model 384, ms", 2.5, True, step_ms(384)),
    Target("times as fast as eager T5, d_model 128", 6, False, step_ratio(128, ["hf_t5_eager"])),
    Target("times as fast as eager T5, d_model 384", 6, False, step_ratio(384, ["hf_t5_eager"])),
    Target("times as fast as compiled and graphed T5, d_model 128", 2, False, step_ratio(128, GRAPHED)),
    Target("times as fast as compiled and graphed T5, d_model 384", 2, False, step_ratio(384, GRAPHED)),
    Target("attention forward, times as fast as SDPA", 1, False, attention_ratio("forward", "sdpa_with_bias")),
    Target("attention backward, times as fast as SDPA", 1, False, attention_ratio("backward", "sdpa_with_bias")),
    Target("attention forward, times as fast as Flex", 1, False, attention_ratio("forward", "flex_attention")),
    Target("attention backward, times as fast as Flex", 1, False, attention_ratio("backward", "flex_attention")),
    Target("RQ-VAE step, batch 2,048, ms", 0.25, True, own_ms("rqvae_step")),
    Target("ids of 10 million items, ms", 60, True, own_ms("assign_ids")),
    Target("beam search, batch 256, beam 20, ms", 1.5, True, search_ms(256, 20)),
    Target("beam search, batch 256, beam 50, ms", 3.0, True, search_ms(256, 50)),
    Target("beam search, batch 1, beam 20, ms", 1.0, True, search_ms(1, 20)),
    Target("trie step, 20 million items, ms", 0.05, True, trie_step_ms(20_000_000)),
    Target("growth per token without attention", 1.3, True, last_value("length_scaling", "growth_per_token")),
    Target("largest difference of the loss curves", 0.001, True, last_value("loss_curve", "largest_difference")),
)


def commands(arguments: argparse.Namespace) -> dict[str, list[str] | str]:
    """The command of every chosen part, or why it is skipped."""
    python, device, output = sys.executable, arguments.device, arguments.output.resolve()
    common = ["--device", device, "--results", str(output / "results"), *(["--quick"] if arguments.quick else [])]
    prepared = None if arguments.prepared is None else arguments.prepared.resolve()
    lengths = [] if prepared is None else ["--lengths", str(prepared / "dataset")]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    # Each test compiles kernels of its own, on one processor core: side by side where pytest-xdist is there.
    in_parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    found: dict[str, list[str] | str] = {
        "gpu_tests": [*pytest, "-m", "gpu", *gpu_test_files()],
        "kernel_tests": [*pytest, *in_parallel, "tests/kernels"],
    }
    for name in TIMED:
        found[name] = [python, "-m", f"benchmarks.{name}", *common, *(lengths if name in WITH_LENGTHS else [])]
    if prepared is None:
        found |= dict.fromkeys(NEED_DATA, "skipped: no --prepared folder")
    else:
        against = [] if arguments.against is None else ["--against", str(arguments.against.resolve())]
        curve = [python, "-m", "benchmarks.loss_curve", "--prepared", str(prepared), *common]
        found["loss_curve"] = [*curve, *against]
        found["train_decoder"] = train_command(prepared, output / "decoder", 20 if arguments.quick else 2000)
    return {name: found[name] for name in PARTS if name in arguments.parts}


def gpu_test_files() -> list[str]:
    """Files with tests for a GPU, from the repository; others may import packages that such a machine lacks."""
    paths = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    found = [path for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(REPOSITORY)) for path in found if path.name != "test_gpu_suite.py"]


def train_command(prepared: Path, run: Path, num_steps: int) -> list[str]:
    """A short training of the Beauty decoder."""
    settings = {
        "train.save_dir_root": run,
        "train.tokenizer": prepared / "tokenizer",
        "DatasetConfig.root": prepared / "dataset",
        "train.max_valid_users": 1000,
        "decoder/LoopConfig.num_steps": num_steps,
        "decoder/LoopConfig.warmup_steps": num_steps // 10,
        "decoder/LoopConfig.eval_every": num_steps // 2,
    }
    overrides = [f"--gin.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "train_decoder.py", "configs/decoder_amazon.gin", "--overwrite", *overrides]


def run_part(part: str, command: list[str] | str, log: Path, limit: float) -> Outcome:
    """Run a part to its end or its time limit, with what it prints in a file."""
    if isinstance(command, str):
        return Outcome(part, command)
    start = perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            status = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(part, status, round(perf_counter() - start, 1), text[-_LOG_CHARACTERS:])


def read_results(folder: Path) -> dict[str, Rows]:
    """Rows of every result below a folder, by name; those of quick runs are called so, and reach no target."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["rows"] for path in sorted(folder.rglob("*.json"))}


def write_summary(outcomes: Sequence[Outcome], output: Path, device: str) -> Rows:
    """Write summary.json, and return the targets' rows."""
    results = read_results(output / "results")
    targets = [target.judge(results) for target in TARGETS]
    summary = {
        "device": device_name(device),
        "commit": commit(),
        "versions": versions(),
        "parts": [asdict(outcome) for outcome in outcomes],
        "targets": targets,
        "results": results,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return targets


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="gets everything that is written")
    made.add_argument("--prepared", type=Path, metavar="FOLDER", help="dataset and tokenizer")
    made.add_argument("--against", type=Path, metavar="CURVE.json", help="loss curve of a CPU; default: the recorded")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    made.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="of each part")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    made.add_argument("--quick", action="store_true", help="few repeats")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the parts one after the other; 0 if all ran to their end and no target was missed."""
    arguments = argument_parser().parse_args(argv)
    check(arguments)
    (arguments.output / "logs").mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    targets: Rows = []
    for part, command in commands(arguments).items():
        print(f"{part} ...", flush=True)
        outcomes.append(run_part(part, command, arguments.output / "logs" / f"{part}.log", arguments.limit))
        targets = write_summary(outcomes, arguments.output, arguments.device)  # an interrupted suite has one, too
    print_table([{"part": outcome.part, "status": outcome.status, "seconds": outcome.seconds} for outcome in outcomes])
    print()
    print_table(targets)
    print(f"all of it: {arguments.output / 'summary.json'}")
    missed = any(row["verdict"] == "MISSED" for row in targets)
    return int(missed or any(outcome.status != "done" for outcome in outcomes))


def check(arguments: argparse.Namespace) -> None:
    """Fill in the recorded CPU curve, and refuse what cannot work before hours are spent on it.

    Raises:
        InputError: if there is no GPU, or a folder is missing.
    """
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here. Rehearse with --device cpu --quick, or use a build for CUDA.")
    recorded = sorted((REPOSITORY / "benchmarks" / "results").glob("cpu-*/loss_curve.json"))
    if arguments.against is None and arguments.prepared is not None and recorded:
        arguments.against = recorded[0]
    for path in (arguments.prepared, arguments.against):
        if path is not None and not path.exists():
            raise InputError(f"{path} does not exist.")


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
