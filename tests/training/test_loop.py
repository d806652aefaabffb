import errno
import json
import math
import signal
import time

import pytest
import torch

from data.schemas import InputError
from tests.training.tiny import LinearTask, loop_config, train_tiny, weights
from training import bad_batches
from training.interrupt import InterruptGuard, TrainingInterrupted
from training.loop import run_training
from training.loop_config import LoopConfig, processor_has_bf16
from training.parameter_groups import ParameterGroup
from training.profile import WARMUP_STEPS
from training.run_folder import RunFolder, RunOptions


def error_of(task):
    with torch.no_grad():
        return task.evaluate(task.model.eval())["valid/error"]


def logged(root):
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "train/examples_per_second")} for record in records
    ]


class StoppingTask(LinearTask):
    """Raises the interrupt that a signal would raise, before a given step."""

    def __init__(self, stop_before, **settings):
        super().__init__(**settings)
        self._stop_before = stop_before

    def batch(self, step):
        if step == self._stop_before:
            raise TrainingInterrupted
        return super().batch(step)


def test_training_improves_and_the_best_weights_are_in_the_model(tmp_path):
    task = LinearTask(dropout=0.0)
    before = error_of(task)
    result = train_tiny(tmp_path / "run", task, num_steps=200, learning_rate=0.05, eval_every=50, checkpoint_every=100)
    assert result.steps == 200
    assert result.stopped_because == "num_steps"
    assert result.best_metric < 0.2 * before
    assert error_of(task) == pytest.approx(result.best_metric, abs=1e-7)


def test_best_weights_are_restored_when_training_gets_worse(tmp_path):
    task = LinearTask(dropout=0.0)
    values = iter([3.0, 1.0, 2.0, 5.0])
    snapshots = []

    def evaluate(model):
        snapshots.append(weights(task))
        return {"valid/error": next(values)}

    task.evaluate = evaluate
    result = train_tiny(tmp_path / "run", task, num_steps=20, eval_every=5)
    assert (result.best_metric, result.best_step) == (1.0, 10)
    torch.testing.assert_close(weights(task), snapshots[1], rtol=0, atol=0)


@pytest.mark.parametrize("stop_before", [5, 7, 10, 13])
@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
def test_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path, stop_before, optimizer):
    settings = {
        "optimizer": optimizer,
        "schedule": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "average_decay": 0.9,
        "parameter_groups": (ParameterGroup(parameters=("*.bias",), learning_rate_factor=0.5, weight_decay=0.0),),
    }
    whole = LinearTask()
    expected = train_tiny(tmp_path / "whole", whole, **settings)
    with pytest.raises(TrainingInterrupted):
        train_tiny(tmp_path / "cut", StoppingTask(stop_before), **settings)
    torch.manual_seed(999)
    resumed = LinearTask()
    result = train_tiny(tmp_path / "cut", resumed, resume="auto", **settings)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert (result.best_metric, result.best_step) == (expected.best_metric, expected.best_step)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert resumed.evaluated == [step for step in whole.evaluated if step > stop_before - stop_before % 5 or step == 0]


def test_the_averages_of_the_weights_are_evaluated_and_kept(tmp_path):
    averaged, plain = LinearTask(), LinearTask()
    train_tiny(tmp_path / "averaged", averaged, average_decay=0.99)
    train_tiny(tmp_path / "plain", plain)
    last = {name: torch.load(tmp_path / name / "checkpoints/step_00000020/state.pt") for name in ("averaged", "plain")}
    torch.testing.assert_close(last["averaged"]["model"], last["plain"]["model"], rtol=0, atol=0)
    kept = last["averaged"]["averages"]["averages"]
    torch.testing.assert_close(weights(averaged), kept, rtol=0, atol=0)
    assert not torch.equal(weights(averaged)["0.weight"], weights(plain)["0.weight"])


def trial(root, **options):
    run = RunFolder.open(root, RunOptions(**options), seed=3)
    task = LinearTask()
    return run_training(task, loop_config(num_steps=1000, warmup_steps=100), run, seed=3), task, run.root


def test_a_dry_run_takes_two_steps_evaluates_saves_and_leaves_the_run_alone(tmp_path):
    train_tiny(tmp_path / "run", LinearTask(), num_steps=5)
    before = sorted(tmp_path.glob("run/**/*"))
    result, task, root = trial(tmp_path / "run", dry_run=True)
    assert (result.steps, task.evaluated, root) == (2, [2], tmp_path / "run-dry-run")
    assert (root / "checkpoints/step_00000002/state.pt").is_file()
    assert sorted(tmp_path.glob("run/**/*")) == before
    assert trial(tmp_path / "run", dry_run=True)[0].steps == 2  # replaces the first


def test_a_profile_measures_the_steps_asked_for_and_an_evaluation(tmp_path, capsys):
    result, task, root = trial(tmp_path / "run", profile=3)
    assert (result.steps, task.evaluated) == (WARMUP_STEPS + 3, [WARMUP_STEPS + 3])
    printed = capsys.readouterr().err
    for phase in ("data", "forward", "backward", "optimizer", "evaluation"):
        assert phase in printed
    assert json.loads((root / "profile/trace.json").read_text())["traceEvents"]


def test_dropout_is_on_so_that_the_resume_test_can_fail(tmp_path):
    first, second = LinearTask(), LinearTask()
    train_tiny(tmp_path / "a", first, num_steps=3)
    run = RunFolder.open(tmp_path / "b", RunOptions(), seed=4)
    run_training(second, loop_config(num_steps=3), run, seed=4)
    assert not torch.equal(first.model[0].weight, second.model[0].weight)


def test_evaluation_leaves_no_trace_in_the_training(tmp_path):
    often, once = LinearTask(), LinearTask()
    train_tiny(tmp_path / "often", often, eval_every=1)
    train_tiny(tmp_path / "once", once, eval_every=20)
    last = {name: torch.load(tmp_path / name / "checkpoints/step_00000020/state.pt") for name in ("often", "once")}
    torch.testing.assert_close(last["often"]["model"], last["once"]["model"], rtol=0, atol=0)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    task = LinearTask()
    first = train_tiny(tmp_path / "run", task)
    again = LinearTask()
    second = train_tiny(tmp_path / "run", again, resume="auto")
    assert again.evaluated == []
    assert (second.steps, second.best_metric, second.best_step) == (20, first.best_metric, first.best_step)
    torch.testing.assert_close(weights(again), weights(task), rtol=0, atol=0)


def test_a_resumed_run_takes_rate_and_weight_decay_of_its_config(tmp_path):
    train_tiny(tmp_path / "run", LinearTask(), num_steps=10, weight_decay=0.5)
    train_tiny(tmp_path / "run", LinearTask(), resume="auto", num_steps=20, learning_rate=0.002, weight_decay=0.1)
    key = "train/learning_rate"
    rates = {record["step"]: record[key] for record in logged(tmp_path / "run") if key in record}
    assert (rates[10], rates[15], rates[20]) == (0.01, 0.002, 0.002)
    state = torch.load(tmp_path / "run/checkpoints/step_00000020/state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.1


def test_accumulation_equals_one_large_batch(tmp_path):
    class Halves(LinearTask):
        def batch(self, step):
            self.last_step = step // 2
            return self.examples(step // 2)[4 * (step % 2) : 4 * (step % 2) + 4]

    large, halves = LinearTask(dropout=0.0), Halves(dropout=0.0)
    train_tiny(tmp_path / "large", large)
    train_tiny(tmp_path / "halves", halves, gradient_accumulation_steps=2)
    torch.testing.assert_close(weights(halves), weights(large), rtol=1e-5, atol=1e-6)
    for name in ("train/loss", "train/gradient_norm"):  # AdamW itself would not mind gradients of another scale
        values = [logged(tmp_path / folder)[0][name] for folder in ("halves", "large")]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert halves.last_step == 19


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    task = LinearTask()
    values = iter([2.0, 1.0, 1.0, 1.5, 0.5])
    task.evaluate = lambda model: {"valid/error": next(values)}
    result = train_tiny(tmp_path / "run", task, num_steps=100, eval_every=2, patience=2)
    assert (result.stopped_because, result.steps, result.best_step, result.best_metric) == ("patience", 8, 4, 1.0)


def test_higher_is_better(tmp_path):
    task = LinearTask()
    task.higher_is_better = True
    values = iter([2.0, 7.0, 1.0])
    task.evaluate = lambda model: {"valid/error": next(values)}
    assert train_tiny(tmp_path / "run", task, num_steps=6, eval_every=2).best_step == 4


def test_time_budget_stops_with_an_evaluation_and_counts_earlier_parts(tmp_path):
    class Slow(LinearTask):
        def batch(self, step):
            time.sleep(0.02)
            return super().batch(step)

    task = Slow()
    result = train_tiny(tmp_path / "run", task, num_steps=10_000, eval_every=5000, max_minutes=0.2 / 60)
    assert result.stopped_because == "max_minutes"
    assert 0 < result.steps <= 11
    assert len(task.evaluated) == 1
    again = train_tiny(tmp_path / "run", Slow(), num_steps=10_000, eval_every=5000, max_minutes=0.2 / 60, resume="auto")
    assert again.steps == result.steps
    assert again.seconds >= 0.2


def test_log_records_means_since_the_last_log(tmp_path):
    task = LinearTask(dropout=0.0)
    losses = []
    plain = task.loss

    def loss(model, batch):
        values = plain(model, batch)
        losses.append(values["loss"].item())
        return values

    task.loss = loss
    train_tiny(tmp_path / "run", task, num_steps=7, schedule="linear", warmup_steps=2)
    del losses[0]  # of the estimate of memory
    training = [record for record in logged(tmp_path / "run") if "train/loss" in record]
    assert [record["step"] for record in training] == [5, 7]
    assert training[0]["train/loss"] == pytest.approx(sum(losses[:5]) / 5, rel=1e-6)
    assert training[1]["train/loss"] == pytest.approx(sum(losses[5:]) / 2, rel=1e-6)
    assert training[0]["train/learning_rate"] == pytest.approx(0.01 * 3 / 5)  # step 4 of a decay from 2 to 7
    assert training[0]["train/gradient_norm"] > 0
    assert "train/absolute" in training[0]
    assert "train/overflow_steps" not in training[0]


def test_gradients_are_clipped(tmp_path):
    class Raw(LinearTask):
        def loss(self, model, batch):
            return {"loss": 1e4 * super().loss(model, batch)["loss"]}

    free, clipped = Raw(dropout=0.0), Raw(dropout=0.0)
    start = weights(free)
    train_tiny(tmp_path / "free", free, num_steps=1, max_grad_norm=None, optimizer="adagrad")
    train_tiny(tmp_path / "clipped", clipped, num_steps=1, max_grad_norm=1e-12, optimizer="adagrad")
    norms = {name: logged(tmp_path / name)[0]["train/gradient_norm"] for name in ("free", "clipped")}
    assert norms["free"] == norms["clipped"] > 1000  # the norm before clipping is logged
    assert max((weights(free)[name] - start[name]).abs().max() for name in start) > 5e-3
    assert max((weights(clipped)[name] - start[name]).abs().max() for name in start) < 5e-3


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(tmp_path, capsys):
    task = LinearTask(poisoned=range(11, 13))
    result = train_tiny(tmp_path / "run", task, max_skipped_steps=3)
    assert result.steps == 20
    assert all(value.isfinite().all() for value in weights(task).values())
    training = {record["step"]: record for record in logged(tmp_path / "run") if "train/loss" in record}
    assert [training[step]["train/skipped_steps"] for step in (5, 10, 15, 20)] == [0, 0, 2, 0]
    assert math.isfinite(training[15]["train/loss"])
    assert "2 of the steps since the last log were skipped" in capsys.readouterr().err


def test_steps_that_stay_not_finite_end_in_an_error_that_names_step_items_and_checkpoint(tmp_path):
    message = (
        r"in 4 steps in a row, 12 to 15, .* the last good checkpoint is .*step_00000010\. "
        r"The batch of step 12 held the items 11\.0, 11\.1, 11\.2, 11\.3, 11\.4 and 3 more"
    )
    with pytest.raises(InputError, match=message):
        train_tiny(tmp_path / "run", LinearTask(poisoned=range(11, 99)), max_skipped_steps=4)
    checkpoints = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000005", "step_00000010"]
    held = json.loads((tmp_path / "run/report/bad_batch.json").read_text())
    assert held == {"step": 12, "items": [f"11.{row}" for row in range(8)]}
    again = train_tiny(tmp_path / "run", LinearTask(), resume="auto")
    assert again.steps == 20


def test_skipped_steps_are_counted_through_a_resume(tmp_path):
    """Nine bad steps before the cut and two after it are eleven in a row."""
    with pytest.raises(TrainingInterrupted):
        train_tiny(tmp_path / "run", StoppingTask(9, poisoned=range(1, 99)), max_skipped_steps=11, log_every=2)
    with pytest.raises(InputError, match="in 11 steps in a row, 2 to 12"):
        train_tiny(
            tmp_path / "run", LinearTask(poisoned=range(1, 99)), max_skipped_steps=11, log_every=2, resume="auto"
        )


def test_a_full_disk_ends_training_with_the_file_the_last_checkpoint_and_the_way_on(tmp_path, monkeypatch):
    append = RunFolder.append_metrics

    def full(run, record):
        if record["step"] == 10:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        append(run, record)

    monkeypatch.setattr(RunFolder, "append_metrics", full)
    message = r"metrics.jsonl: the disk is full\. The last whole checkpoint is .*step_00000005\. .* --resume auto"
    with pytest.raises(InputError, match=message):
        train_tiny(tmp_path / "run", LinearTask())


def test_a_full_disk_does_not_hide_which_batch_was_bad(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bad_batches, "replace_file", full)
    with pytest.raises(InputError, match=r"The batch of step 1 held the items 0\.0, .* and 3 more\. Look at"):
        train_tiny(tmp_path / "run", LinearTask(poisoned=range(99)), max_skipped_steps=3)


def test_a_run_begun_with_the_checkpoint_of_another_saves_it_when_it_is_stopped_at_once(tmp_path, monkeypatch):
    train_tiny(tmp_path / "other", LinearTask(), num_steps=7)
    checkpoint = str(tmp_path / "other/checkpoints/step_00000007")
    with monkeypatch.context() as patched:
        patched.setattr(InterruptGuard, "__enter__", lambda guard: vars(guard).update(requested=True))
        with pytest.raises(TrainingInterrupted):
            train_tiny(tmp_path / "run", LinearTask(), resume=checkpoint)
    resumed, whole = LinearTask(), LinearTask()
    train_tiny(tmp_path / "run", resumed, resume="auto")
    train_tiny(tmp_path / "whole", whole, resume=checkpoint)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert resumed.evaluated == whole.evaluated


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path):
    task = LinearTask(dropout=0.0)
    plain = task.batch

    def batch(step):
        if step == 7:
            task.model[0].weight.data.fill_(math.inf)
        return plain(step)

    task.batch = batch
    with pytest.raises(
        InputError,
        match="weights have been infinite or NaN since step 8 or a little before; ",
    ):
        train_tiny(tmp_path / "run", task)
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000005"]


def test_nan_selection_metric_is_an_error(tmp_path):
    task = LinearTask()
    task.evaluate = lambda model: {"valid/error": math.nan}
    with pytest.raises(InputError, match="evaluation at step 10 gave valid/error = nan"):
        train_tiny(tmp_path / "run", task)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_fp16_on_cpu_is_refused(tmp_path):
    with pytest.raises(InputError, match=r'mixed_precision = "fp16" needs a CUDA device, this run is on cpu'):
        train_tiny(tmp_path / "run", LinearTask(), mixed_precision="fp16")


@pytest.mark.skipif(not processor_has_bf16(), reason="needs a processor with bf16")
def test_bf16_computes_the_loss_in_bf16_and_evaluates_in_fp32(tmp_path):
    task = LinearTask(dropout=0.0)
    dtypes = {}
    plain_loss, plain_evaluate = task.loss, task.evaluate

    def loss(model, batch):
        dtypes["train"] = model(batch[:, :4]).dtype
        return plain_loss(model, batch)

    def evaluate(model):
        dtypes["evaluate"] = model(torch.zeros(1, 4)).dtype
        return plain_evaluate(model)

    task.loss, task.evaluate = loss, evaluate
    train_tiny(tmp_path / "bf16", task, num_steps=2, mixed_precision="bf16")
    assert dtypes == {"train": torch.bfloat16, "evaluate": torch.float32}
    train_tiny(tmp_path / "no", task, num_steps=2, mixed_precision="no")  # another precision in the same process
    assert dtypes["train"] == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_is_the_default_on_cuda(tmp_path):
    task = LinearTask(dropout=0.0)
    result = train_tiny(tmp_path / "run", task, num_steps=200, learning_rate=0.05, eval_every=50)
    assert result.best_metric < 0.5
    assert "train/overflow_steps" in logged(tmp_path / "run")[0]
    again = train_tiny(tmp_path / "run", LinearTask(dropout=0.0), num_steps=210, eval_every=50, resume="auto")
    assert again.steps == 210


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "LoopConfig.num_steps expected at least 1, got 0"),
        ({"patience": 0}, "LoopConfig.patience expected at least 1, got 0"),
        ({"learning_rate": -1.0}, "LoopConfig.learning_rate expected a positive number, got -1.0"),
        ({"max_minutes": math.inf}, "LoopConfig.max_minutes expected a positive number, got inf"),
        ({"warmup_steps": -1}, "warmup_steps expected at least 0, got -1"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        loop_config(**change)


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    task = LinearTask()
    task.model.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameters"):
        train_tiny(tmp_path / "run", task)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train_tiny(tmp_path / "run", LinearTask(), num_steps=5)
    other = LinearTask()
    other.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.1), torch.nn.Linear(3, 1))
    with pytest.raises(InputError, match=r"step_00000005 does not fit this model or optimizer: .*size mismatch"):
        train_tiny(tmp_path / "run", other, resume="auto")


@pytest.mark.parametrize(("before", "now"), [("adamw", "adagrad"), ("adagrad", "adamw")])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, before, now):
    train_tiny(tmp_path / "run", LinearTask(), num_steps=5, optimizer=before)
    with pytest.raises(InputError, match=rf"does not fit this model or optimizer: .* not that of (?i:{now})"):
        train_tiny(tmp_path / "run", LinearTask(), resume="auto", optimizer=now)


def test_tied_weights_survive_saving_and_loading(tmp_path):
    class Tied(LinearTask):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
            self.model[1].weight = self.model[0].weight

    task = Tied()
    train_tiny(tmp_path / "run", task, num_steps=5)
    again = Tied()
    train_tiny(tmp_path / "run", again, num_steps=5, resume="auto")
    assert again.model[1].weight is again.model[0].weight
    torch.testing.assert_close(weights(again), weights(task), rtol=0, atol=0)


def test_plain_lines_when_stderr_is_no_terminal(tmp_path, capsys):
    train_tiny(tmp_path / "run", LinearTask(), num_steps=10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("ops run ")
    assert lines[1].startswith("training takes about ")
    assert lines[2].startswith("step 5/10  loss ")
    assert " examples/s " in lines[2]
    assert lines[2].endswith(" left")
    assert any(line.startswith("step 10: valid/error ") and line.endswith("(best so far)") for line in lines)


def test_the_run_folder_says_how_the_run_computes(tmp_path):
    train_tiny(tmp_path / "run", LinearTask(), num_steps=2, mixed_precision="no", cuda_graphs=False)
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["ops"].startswith("ops run ")
    assert environment["cuda_graphs"] is False
    assert environment["mixed_precision"] == "no"
    assert "versions" in environment


class SignalledTask(LinearTask):
    """Asks for an end in the last step before an evaluation, as Ctrl-C would."""

    def batch(self, step):
        if step == 19:
            signal.raise_signal(signal.SIGINT)
        return super().batch(step)


def test_a_signal_before_an_evaluation_does_not_wait_for_it(tmp_path):
    task = SignalledTask()
    with pytest.raises(TrainingInterrupted):
        train_tiny(tmp_path, task)
    assert task.evaluated == [10]


class SignalledEvaluationTask(LinearTask):
    """Asks for an end within the last evaluation."""

    def evaluate(self, model):
        if self.last_step == 19:
            signal.raise_signal(signal.SIGINT)
        return super().evaluate(model)


@pytest.mark.parametrize("interrupted", [SignalledTask, SignalledEvaluationTask])
def test_every_step_is_logged_once_however_often_the_run_is_resumed(tmp_path, interrupted):
    train_tiny(tmp_path / "whole", LinearTask())
    with pytest.raises(TrainingInterrupted):
        train_tiny(tmp_path / "cut", interrupted())
    for _ in range(3):
        task = LinearTask()
        train_tiny(tmp_path / "cut", task, resume="auto")
        assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert task.evaluated == []


def test_fp16_on_cpu_is_refused_before_anything_is_prepared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r'LoopConfig.mixed_precision = "fp16" needs a CUDA device'):
        LoopConfig(num_steps=1, learning_rate=0.1, mixed_precision="fp16")
