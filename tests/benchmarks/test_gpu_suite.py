import importlib
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.common import REPOSITORY
from benchmarks.gpu_suite import TARGETS, Outcome, commands, run_part, write_summary
from data.schemas import InputError
from training.gin_config import clear_config, load_config

RESULTS = {
    "train_step": [
        {
            "case": "amazon-beauty, batch 256, d_model 128, GPU, bf16",
            "implementation": "ours_graphed",
            "median_ms": 1.1,
            "vs_hf_t5_eager": 9.0,
            "vs_hf_t5_graphed": 1.9,
            "vs_hf_t5_reduce_overhead": 2.2,
        },
        {"case": "d_model 128, GPU, fp32", "implementation": "ours", "median_ms": 3.0, "vs_hf_t5_eager": 5.0},
        {"case": "d_model 128, GPU, fp32", "implementation": "hf_t5_eager", "median_ms": 0.1},
        {"case": "d_model 128, GPU, fp32", "implementation": "ours_compiled", "note": "n/a: no"},
    ],
    "attention": [
        {"pass": "forward", "implementation": "sdpa_with_bias", "median_ms": 1.0, "ours_faster": 2.0},
        {"pass": "forward", "implementation": "sdpa_with_bias", "median_ms": 1.0, "ours_faster": 0.9},
        {"pass": "backward", "implementation": "sdpa_with_bias", "median_ms": 1.0, "ours_faster": 1.5},
    ],
    "beam_search": [
        {"implementation": "ours", "batch": 256, "beam_width": 20, "items": 12101, "median_ms": 9.0},
        {"implementation": "ours_graphed", "batch": 256, "beam_width": 20, "items": 12101, "median_ms": 1.4},
        {"implementation": "ours_graphed", "batch": 256, "beam_width": 20, "items": 100, "median_ms": 0.1},
        {"implementation": "dense_mask", "batch": 1, "beam_width": 20, "items": 12101, "median_ms": 0.9},
    ],
    "trie": [
        {"implementation": "trie_topk_step", "items": 20_000_000, "median_ms": 0.03},
        {"implementation": "trie_topk_step", "items": 20_000_000, "median_ms": 0.06},
        {"implementation": "trie_topk_step", "items": 10, "median_ms": 0.09},
    ],
    "length_scaling": [{"items": 64}, {"case": "claim", "growth_per_token": 1.1}],
}


def test_targets_by_hand():
    judged = {target.name: target.judge(RESULTS) for target in TARGETS}
    verdicts = {name: (row["measured"], row["verdict"]) for name, row in judged.items()}
    assert verdicts["training step, d_model 128, ms"] == (1.1, "met")
    assert verdicts["training step, d_model 384, ms"] == ("", "not measured")
    assert verdicts["times as fast as eager T5, d_model 128"] == (9.0, "met")
    assert verdicts["times as fast as compiled and graphed T5, d_model 128"] == (1.9, "MISSED")
    assert verdicts["attention forward, times as fast as SDPA"] == (0.9, "MISSED")
    assert verdicts["attention backward, times as fast as SDPA"] == (1.5, "met")
    assert verdicts["attention forward, times as fast as Flex"] == ("", "not measured")
    assert verdicts["beam search, batch 256, beam 20, ms"] == (1.4, "met")
    assert verdicts["beam search, batch 1, beam 20, ms"] == ("", "not measured")
    assert verdicts["trie step, 20 million items, ms"] == (0.06, "MISSED")
    assert verdicts["growth per token without attention"] == (1.1, "met")


def test_every_part_of_the_list_has_a_command(tmp_path):
    everything = gpu_suite.argument_parser().parse_args(["--output", str(tmp_path), "--prepared", str(tmp_path)])
    found = commands(everything)
    assert tuple(found) == gpu_suite.PARTS
    assert all(isinstance(command, list) for command in found.values())
    for part in gpu_suite.TIMED:
        assert (REPOSITORY / "benchmarks" / f"{part}.py").is_file()
    without_data = commands(gpu_suite.argument_parser().parse_args(["--output", str(tmp_path)]))
    assert without_data["loss_curve"] == "skipped: no --prepared folder"


def test_the_training_command_is_a_valid_config(tmp_path):
    command = gpu_suite.train_command(tmp_path, tmp_path / "run", 100)
    overrides = [argument.removeprefix("--gin.") for argument in command if argument.startswith("--gin.")]
    assert importlib.import_module("train_decoder")
    try:
        config = load_config([REPOSITORY / command[2]], overrides, script="train_decoder", supplied=["options"])
    finally:
        clear_config()
    assert "LoopConfig.num_steps = 100" in config.operative_config()


def test_parts_that_fail_or_take_too_long_are_noted(tmp_path):
    def run(code, limit):
        return run_part("part", [sys.executable, "-c", code], tmp_path / "part.log", limit)

    assert run("print('hello')", 60).status == "done"
    assert run("print('hello')", 60).log == "hello\n"
    assert run("raise SystemExit(3)", 60).status == "failed (3)"
    assert run("import time; time.sleep(60)", 1).status == "out of time"
    assert run_part("part", "skipped: why", tmp_path / "part.log", 1) == Outcome("part", "skipped: why")


def test_the_summary_holds_everything(tmp_path):
    folder = tmp_path / "results" / "a-gpu"
    folder.mkdir(parents=True)
    for name, rows in RESULTS.items():
        (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))
    (folder / "attention-quick.json").write_text(json.dumps({"rows": []}))
    write_summary([Outcome("attention", "done", 1.0, "log")], tmp_path, "cpu")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["results"] == RESULTS | {"attention-quick": []}
    assert summary["parts"][0]["log"] == "log"
    assert len(summary["targets"]) == len(TARGETS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    arguments = gpu_suite.argument_parser().parse_args(["--output", str(tmp_path)])
    with pytest.raises(InputError, match=r"finds no GPU here\. Rehearse with --device cpu --quick"):
        gpu_suite.check(arguments)


def test_gpu_tests_are_collected_without_optional_packages(tmp_path):
    """An error while collecting would make the part fail, however well the tests on the GPU went."""
    arguments = gpu_suite.argument_parser().parse_args(["--output", str(tmp_path), "--parts", "gpu_tests"])
    pytest_arguments = commands(arguments)["gpu_tests"][3:]
    script = f"""
import sys
for name in {("polars", "wandb", "sentence_transformers", "transformers", "sklearn", "matplotlib")}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main([*{pytest_arguments}, "--collect-only"]))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    for name in ("test_graphs.py", "test_accuracy.py", "test_tokenizer.py", "test_loop.py"):
        assert name in result.stdout


def test_the_suite_needs_no_optional_packages():
    """Each part's module imports without them; what they need of transformers and matplotlib comes when it is used."""
    names = [f"benchmarks.{part}" for part in (*gpu_suite.TIMED, "gpu_suite", "loss_curve")] + ["train_decoder"]
    missing = ("polars", "wandb", "sentence_transformers", "transformers", "sklearn", "matplotlib")
    script = f"""
import importlib, sys
for name in {missing}:
    sys.modules[name] = None
for name in {names}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
