import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from data.schemas import InputError
from tests.training.tasks import CPU
from tests.training.tiny import LinearTask, loop_config
from training.loop import run_training
from training.profile import TRACE, WARMUP_STEPS, StepProfile
from training.run_folder import RunFolder, RunOptions

EVERY = {"evaluation": 100}
DATA_SECONDS = 0.004


def profiled(folder: Path, num_steps: int) -> StepProfile:
    return StepProfile(folder, num_steps, CPU, every=EVERY)


def steps(num_steps: int) -> Iterator[None]:
    """Steps of a training: slow data, one sine forward, one cosine backward; warm-up also draws random numbers."""
    for step in range(num_steps):
        with record_function("data"):
            time.sleep(DATA_SECONDS)
        with record_function("forward"):
            torch.ones(8).sin()
        with record_function("backward"):
            torch.ones(8).cos()
        with record_function("optimizer"):
            pass
        if step < WARMUP_STEPS:
            torch.rand(8)
        yield


def run(folder: Path, num_steps: int) -> str:
    with profiled(folder, num_steps) as profile:
        for _ in steps(WARMUP_STEPS + num_steps):
            profile.advance()
        with profile.aside("evaluation"):
            time.sleep(0.1)
            torch.ones(8).tan()
    return profile.report()


def test_shares_of_all_phases(tmp_path: Path) -> None:
    report = run(tmp_path, 12)
    numbers = json.loads((tmp_path / "profile.json").read_text())
    assert list(numbers["phases"]) == ["data", "forward", "backward", "optimizer", "rest", "evaluation"]
    assert sum(phase["share"] for phase in numbers["phases"].values()) == pytest.approx(1)
    data, evaluation = numbers["phases"]["data"], numbers["phases"]["evaluation"]
    assert 1000 * DATA_SECONDS <= data["ms"] <= numbers["step_ms"]
    assert data["share"] > 0.5
    assert evaluation["once_ms"] >= 100
    assert evaluation["ms"] == pytest.approx(evaluation["once_ms"] / 100)
    assert (tmp_path / "profile.txt").read_text() == report + "\n"
    assert report.startswith("12 steps profiled")
    assert "ms every 100 steps" in report
    assert report.endswith(str(tmp_path / TRACE))


def test_operations_of_profiled_steps_alone(tmp_path: Path) -> None:
    run(tmp_path, 25)
    calls = {row["name"]: row["calls"] for row in json.loads((tmp_path / "profile.json").read_text())["operations"]}
    assert calls["aten::sin"] == calls["aten::cos"] == 1
    assert calls.keys().isdisjoint({"aten::rand", "aten::tan"})  # of the warm-up, of the evaluation


def test_the_trace_holds_the_first_steps(tmp_path: Path) -> None:
    (tmp_path / TRACE).write_text("of an earlier profile")
    run(tmp_path, 25)
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    for phase in ("data", "forward", "backward", "optimizer"):
        assert sum(event["name"] == phase and event["ph"] == "X" for event in events) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "profile.txt", TRACE]


def test_a_training_that_ends_early(tmp_path: Path) -> None:
    with profiled(tmp_path, 100) as profile:
        for _ in steps(WARMUP_STEPS + 3):
            profile.advance()
        with profile.aside("evaluation"):
            torch.ones(8).tan()
    assert profile.report().startswith("3 steps profiled")
    assert "aten::tan" not in profile.report()
    with profiled(tmp_path, 100) as profile:
        for _ in steps(WARMUP_STEPS):
            profile.advance()
    assert "ended before the first step" in profile.report()
    assert not (tmp_path / TRACE).exists()


def test_an_error_passes_and_the_profiler_ends(tmp_path: Path) -> None:
    def fail_after(num_steps: int) -> None:
        with profiled(tmp_path / "failed", 5) as profile:
            for _ in steps(num_steps):
                profile.advance()
            raise KeyError("of the loop")

    with pytest.raises(KeyError, match="of the loop"):
        fail_after(WARMUP_STEPS + 2)
    assert list((tmp_path / "failed").iterdir()) == []
    run(tmp_path / "next", 1)
    assert (tmp_path / "next" / TRACE).is_file()


def test_at_least_one_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_steps expected at least 1, got 0"):
        profiled(tmp_path, 0)


def test_a_trial_of_the_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = loop_config(num_steps=1000, eval_every=500, checkpoint_every=1000)
    trial = RunFolder.open(tmp_path / "run", RunOptions(profile=4), seed=0)
    result = run_training(LinearTask(), config, trial, seed=0)
    assert result.steps == WARMUP_STEPS + 4
    numbers = json.loads((tmp_path / "run-profile" / "profile" / "profile.json").read_text())
    assert numbers["num_steps"] == 4
    assert all(numbers["phases"][name]["ms"] > 0 for name in ("data", "forward", "backward", "optimizer"))
    assert numbers["phases"]["evaluation"]["every"] == 500
    assert numbers["phases"]["checkpoint"]["every"] == 1000
    assert "4 steps profiled" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
