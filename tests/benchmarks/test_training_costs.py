import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import demo_tasks, training_costs
from benchmarks.common import REPOSITORY
from benchmarks.training_costs import Contender, Sizes, paired_cost, shared_out, verdict, verify, verify_loop
from data.schemas import InputError
from tests.training.tiny import LinearTask
from training.metrics_log import MetricsLog

TINY = Sizes(num_steps=8, log_every=2, verified=2, repeats=2, writes=2)


class UnmeasuredTask(LinearTask):
    """As the benchmark's own tasks, it keeps the weights of the first evaluation."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {self.selection_metric: 0.0}


def test_different_weights_are_noticed() -> None:
    contenders = {name: Contender(name, LinearTask) for name in ("ours", "plain")}
    verify("linear", contenders, 2)
    with torch.no_grad():
        next(contenders["plain"].task.model.parameters())[0, 0] += 1e-6
    with pytest.raises(AssertionError, match=r"plain: 0.weight is not that of ours"):
        verify("linear", contenders, 1)


def test_another_loop_is_noticed(tmp_path: Path) -> None:
    class Forgetful(UnmeasuredTask):
        """Draws other batches in every training."""

        trainings = 0

        def __init__(self) -> None:
            super().__init__()
            Forgetful.trainings += 1

        def examples(self, step: int) -> torch.Tensor:
            return super().examples(step + 100 * Forgetful.trainings)

    verify_loop("linear", UnmeasuredTask, TINY, tmp_path / "same")
    with pytest.raises(AssertionError, match=r"whole_loop: 0.weight is not that of ours"):
        verify_loop("linear", Forgetful, TINY, tmp_path / "other")


def test_costs_by_hand() -> None:
    assert paired_cost([1.1, 5.2, 9.3], [1.0, 5.0, 9.0]) == 0.04  # in rounds that are slow for all
    row = shared_out("case", "checkpoint", [0.2, 0.3, 0.4], num_steps=1000, step_ms=10.0)
    assert (row["median_ms"], row["ms_per_step"], row["cost"]) == (300.0, 0.3, 0.03)


def test_the_claim_counts_loop_and_disk() -> None:
    def rows(loop: float) -> list[dict[str, Any]]:
        costs = {"whole_loop": loop, "ours": 0.5, "checkpoint_waiting": 0.01}
        return [{"case": "linear", "implementation": name, "cost": cost} for name, cost in costs.items()]

    assert verdict("linear", rows(0.015)).endswith("linear: 1.50% outside the steps, the disk 1.00% at most, met")
    assert verdict("linear", rows(0.021)).endswith("MISSED")


def test_a_row_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log_without_trackers(*arguments: Any, wandb_logging: bool, tensorboard_logging: bool) -> MetricsLog:
        if wandb_logging or tensorboard_logging:
            raise InputError("not installed")
        return MetricsLog(*arguments, wandb_logging=False, tensorboard_logging=False)

    monkeypatch.setattr(training_costs, "TASKS", {"linear": UnmeasuredTask})
    monkeypatch.setattr(training_costs, "QUICK", TINY)
    monkeypatch.setattr(training_costs, "MetricsLog", log_without_trackers)
    assert training_costs.main(["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]) == 0
    assert "linear: the whole loop gives the weights of its 2 steps" in capsys.readouterr().out
    (path,) = tmp_path.rglob("training_costs-quick.json")
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    steps = ["ours", "averaged_weights", "parameter_groups", "plain"]
    rare = ["checkpoint_waiting", "checkpoint", "log", "log_tensorboard", "log_wandb"]
    assert list(rows) == ["whole_loop", *steps, *rare]
    assert rows["log_wandb"]["note"] == "n/a: not installed"
    assert rows["ours"]["against"] == "plain"
    assert rows["whole_loop"]["cost"] > 0
    assert 0 < rows["checkpoint"]["median_ms"] < rows["checkpoint_waiting"]["median_ms"]


def test_tasks_are_of_the_sizes_of_the_demo() -> None:
    """Numbers of the tasks, as the demo's configs write them."""
    model = demo_tasks.decoder_task().model.config
    names = ["d_model", "num_heads", "head_dim", "d_ff", "num_encoder_layers", "num_decoder_layers", "num_user_buckets"]
    decoder = (REPOSITORY / "configs/demo/decoder.gin").read_text()
    for line in (
        *(f"RetrievalModelConfig.{name} = {getattr(model, name)}" for name in names),
        f"max_history = {demo_tasks.MAX_HISTORY}",
    ):
        assert f"{line}\n" in decoder
    rqvae = demo_tasks.rqvae_task().model.config
    lines = (REPOSITORY / "configs/demo/rqvae.gin").read_text()
    for name in ("input_dim", "hidden_dims", "codebook_sizes"):
        assert f"RqVaeConfig.{name} = {getattr(rqvae, name)}\n" in lines
    assert f"batch_size = {demo_tasks.BATCH_SIZE}\n" in lines
