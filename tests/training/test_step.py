"""Training steps that are recorded and replayed, by a stand-in for CUDA graphs."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import ops.graphs
import training.step
from data.schemas import InputError
from tests.ops.recorders import TapeRecorder
from tests.training.tasks import rqvae_task
from tests.training.tiny import LinearTask, loop_config, train_tiny, weights
from training.averages import AveragedWeights
from training.in_place import InPlaceChanges
from training.loop_config import LoopConfig
from training.optimizers import build_optimizer, optimizer_state, set_rate_
from training.parameter_groups import ParameterGroup
from training.processes import uses_cuda
from training.step import OptimizerStep
from training.task import Task


@pytest.fixture
def recorders(monkeypatch) -> list[TapeRecorder]:
    """Every recorder that was made; recording is on wherever a run is not told otherwise."""
    if torch.cuda.is_available():
        pytest.skip("a stand-in for machines without a GPU; tests/gpu/test_graphs.py has the real one")
    made = []

    def recorder_for(device):
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setattr(ops.graphs, "recorder_for", recorder_for)
    monkeypatch.setattr(LoopConfig, "uses_cuda_graphs", lambda config, processes=1: bool(config.cuda_graphs))
    return made


def checkpoint(root, step):
    return torch.load(root / f"checkpoints/step_{step:08d}/state.pt", weights_only=True)


RATE = 2**-7  # the same number in fp32, in which a recorded rate is held


def test_a_recorded_training_equals_the_plain_one(tmp_path, recorders):
    plain, recorded = LinearTask(), LinearTask()
    train_tiny(tmp_path / "plain", plain, cuda_graphs=False, learning_rate=RATE, weight_decay=0.01)
    assert recorders == []
    train_tiny(tmp_path / "recorded", recorded, learning_rate=RATE, weight_decay=0.01)
    assert recorders[0].log == ["run", "run", "record", *["replay"] * 18]
    torch.testing.assert_close(weights(recorded), weights(plain), rtol=0, atol=0)
    one, other = checkpoint(tmp_path / "plain", 20), checkpoint(tmp_path / "recorded", 20)
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0)
    assert one["window"] == other["window"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "recorded")]
    assert [line.partition('"train/loss"')[2].split(",")[0] for line in lines[0]] == [
        line.partition('"train/loss"')[2].split(",")[0] for line in lines[1]
    ]


def test_the_rate_of_a_recorded_training_changes(tmp_path, recorders):
    settings = {"schedule": "cosine", "warmup_steps": 4, "learning_rate": 0.05}
    plain, recorded = LinearTask(), LinearTask()
    train_tiny(tmp_path / "plain", plain, cuda_graphs=False, **settings)
    train_tiny(tmp_path / "recorded", recorded, **settings)
    assert "replay" in recorders[0].log
    torch.testing.assert_close(weights(recorded), weights(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graphs", [(True, False), (False, True)])
def test_a_run_resumes_with_and_without_graphs(tmp_path, recorders, graphs):
    whole, resumed = LinearTask(), LinearTask()
    train_tiny(tmp_path / "whole", whole, cuda_graphs=False, learning_rate=RATE)
    train_tiny(tmp_path / "cut", LinearTask(), num_steps=10, cuda_graphs=graphs[0], learning_rate=RATE)
    (group,) = checkpoint(tmp_path / "cut", 10)["optimizer"]["param_groups"]
    assert type(group["lr"]) is float
    train_tiny(tmp_path / "cut", resumed, resume="auto", cuda_graphs=graphs[1], learning_rate=RATE)
    assert len(recorders) == 1
    assert recorders[0].log.count("record") == 1
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_a_loss_that_waits_trains_without_graphs(tmp_path, recorders, caplog):
    class Waiting(LinearTask):
        def loss(self, model, batch):
            losses = super().loss(model, batch)
            return losses | {"half": losses["loss"] * (0.5 if float(losses["loss"].detach()) > 0 else 1.0)}

    plain, waiting = LinearTask(), Waiting()
    train_tiny(tmp_path / "plain", plain, cuda_graphs=False, learning_rate=RATE)
    train_tiny(tmp_path / "waiting", waiting, learning_rate=RATE)
    assert recorders[0].log == ["run", "run", "record"]
    assert "training step: runs without CUDA graphs" in caplog.text
    torch.testing.assert_close(weights(waiting), weights(plain), rtol=0, atol=0)


def step_of(
    task: Task, *, recorded: bool = False, scaler=None, averages=None, other_process=None, **settings
) -> OptimizerStep:
    """A step on this processor; `other_process` changes flags as reducing them over two processes would."""
    config = loop_config(learning_rate=RATE, weight_decay=0.1, **settings)
    accelerator = SimpleNamespace(
        scaler=scaler,
        device=torch.device("cpu"),
        autocast=nullcontext,
        no_sync=lambda model: nullcontext(),
        num_processes=1 if other_process is None else 2,
        reduce=lambda flag, reduction: other_process(flag),
    )
    optimizer = build_optimizer(task.model, config, recorded=recorded)
    if averages is not None:
        averages = AveragedWeights(task.model, averages)
    return OptimizerStep(
        task, task.model, optimizer, accelerator=accelerator, config=config, recorded=recorded, averages=averages
    )


def everything_of(step: OptimizerStep) -> dict:
    """A copy of all that training changes, random states aside."""
    model, averages = step._model.state_dict(), step._averages
    moments = optimizer_state(step._optimizer)["state"]
    return copy.deepcopy([model, moments, averages and averages.state_dict()])


def logged(step: OptimizerStep, *batches) -> dict[str, float]:
    sums = step(batches)
    return dict(zip(sums.names, sums.values.tolist(), strict=True))


def bad_gradient(task: LinearTask) -> None:
    """The loss stays as it is; its gradient is NaN where the batch begins with 7, and a part of it where with 8."""
    plain = task.loss

    def loss(model, batch):
        losses = plain(model, batch)
        root = torch.sqrt((batch[0, 0] - 7).abs() + 0 * model[0].weight.sum())  # has no slope at 0
        part = losses["absolute"] * torch.where(batch[0, 0] == 8, math.inf, 1.0)
        return {"loss": losses["loss"] + 0 * root, "absolute": part}

    task.loss = loss


@pytest.mark.parametrize(("optimizer", "recorded"), [("adamw", False), ("adamw", True), ("adagrad", False)])
@pytest.mark.parametrize("first", [math.nan, 7.0, 8.0], ids=["loss", "gradient", "part of the loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(recorders, first, optimizer, recorded):
    task = LinearTask(dropout=0.0)
    bad_gradient(task)
    step = step_of(task, recorded=recorded, averages=0.9, optimizer=optimizer)
    for index in range(4):
        assert logged(step, task.examples(index))["skipped"] == 0
    bad = task.examples(4)
    bad[0, 0] = first
    before = everything_of(step)
    assert logged(step, bad) == {"loss/loss": 0, "loss/absolute": 0, "norm": 0, "skipped": 1}
    assert logged(step, bad)["skipped"] == 1
    torch.testing.assert_close(everything_of(step), before, rtol=0, atol=0)
    assert step.skipped_in_a_row() == 2
    assert logged(step, task.examples(5))["loss/loss"] > 0
    assert step.skipped_in_a_row() == 0
    after = everything_of(step)
    for number in range(3):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(after[number], before[number], rtol=0, atol=0)


def test_recorded_steps_with_averages_and_skips_equal_plain_ones(recorders):
    groups = (ParameterGroup(parameters=("0.*",), learning_rate_factor=0.5),)
    steps = []
    for recorded in (False, True):
        task = LinearTask()
        step = step_of(task, recorded=recorded, averages=0.9, parameter_groups=groups)
        torch.manual_seed(1)
        for index in range(10):
            set_rate_(step._optimizer, RATE / 2**index)
            step([task.examples(index) * (math.nan if index in (0, 4, 5) else 1.0)])
        steps.append(step)
    assert recorders[0].log == ["run", "run", "record", *["replay"] * 8]
    torch.testing.assert_close(everything_of(steps[1]), everything_of(steps[0]), rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
def test_a_first_step_that_is_not_finite_is_as_if_it_had_not_been(optimizer):
    skipping, plain = LinearTask(dropout=0.0), LinearTask(dropout=0.0)
    steps = [step_of(task, optimizer=optimizer) for task in (skipping, plain)]
    assert logged(steps[0], skipping.examples(0) * math.inf)["skipped"] == 1
    for index in range(3):
        for task, step in zip((skipping, plain), steps, strict=True):
            step([task.examples(index)])
    torch.testing.assert_close(everything_of(steps[0]), everything_of(steps[1]), rtol=0, atol=0)


def test_one_bad_batch_of_several_skips_the_step():
    task = LinearTask(dropout=0.0)
    step = step_of(task, gradient_accumulation_steps=2)
    before = everything_of(step)
    assert logged(step, task.examples(0) * math.nan, task.examples(1))["skipped"] == 1
    torch.testing.assert_close(everything_of(step)[0], before[0], rtol=0, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_fails_on_another_process_is_skipped_here(scaled):
    """With loss scaling the gradients of all are bad by then, and yet it is no overflow."""
    task, scaling = LinearTask(dropout=0.0), scaler() if scaled else None
    bad_gradient(task)
    step = step_of(task, scaler=scaling, other_process=lambda flag: flag + 1)
    before, batch = everything_of(step), task.examples(0)
    if scaled:
        batch[0, 0] = 7.0
    assert logged(step, batch)["skipped"] == 1
    torch.testing.assert_close(everything_of(step)[0], before[0], rtol=0, atol=0)
    assert step.skipped_in_a_row() == 1


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_codebooks_that_learn_without_gradient_are_put_back(recorders, first, recorded):
    """Moving averages, counters of idle codes, and codes that were restarted."""
    task = rqvae_task("ema", num_batches=20)
    task.model.train()
    step = step_of(task, recorded=recorded)
    for index in range(0 if first else 6):
        step([task.batch(index)])
    before = everything_of(step)
    task._features[:] = math.nan
    assert logged(step, task.batch(6))["skipped"] == 1
    torch.testing.assert_close(everything_of(step)[0], before[0], rtol=0, atol=0)
    assert {"ema_counts", "idle_steps"} <= {name.rpartition(".")[2] for name in before[0]}


class WritingModel(torch.nn.Module):
    """Writes to a parameter and to its buffers when it is called, not to its other parameters."""

    def __init__(self):
        super().__init__()
        self.codes, self.norm = torch.nn.Parameter(torch.zeros(2)), torch.nn.BatchNorm1d(3)

    def forward(self, x):
        with torch.no_grad():
            self.codes.add_(1)
        return self.norm(x)


def test_what_a_loss_writes_is_put_back_and_nothing_else_copied_for_it():
    model = WritingModel()
    changes, num_copied = InPlaceChanges(model), []
    for undo in (True, True, False):
        before = copy.deepcopy(model.state_dict())
        changes.begin()
        num_copied.append(len(changes._copied))
        model(torch.randn(5, 3))
        changes.end(undo=torch.tensor(undo))
        if undo:
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert num_copied == [6, 4, 4]  # three buffers of the norm, and the codes
    assert model.codes.tolist() == [1, 1]
    assert int(model.norm.num_batches_tracked) == 1


def test_the_counter_of_skipped_steps_is_saved():
    task = LinearTask()
    step, resumed = step_of(task), step_of(task)
    for _ in range(3):
        step([task.examples(0) * math.nan])
    assert step.state_dict() == {"skipped_in_a_row": 3}
    resumed.load_state_dict(step.state_dict())
    resumed([task.examples(0) * math.nan])
    assert resumed.skipped_in_a_row() == 4


def scaler(scale: float = 2.0**20) -> torch.amp.GradScaler:
    """Loss scaling as on a GPU."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)


@pytest.mark.parametrize(("optimizer", "recorded"), [("adamw", False), ("adamw", True), ("adagrad", False)])
def test_an_overflow_changes_nothing_and_halves_the_scale(recorders, optimizer, recorded):
    task, scaling = LinearTask(dropout=0.0), scaler()
    step = step_of(task, scaler=scaling, recorded=recorded, averages=0.9, optimizer=optimizer)
    scales, kinds = [], []
    for index in range(8):
        before = everything_of(step)
        batch = task.examples(index)
        values = logged(step, batch * 1e18 if index == 5 else batch)
        kinds.append((values["skipped"], values["overflow"], values["norm"] > 0))
        scales.append(scaling.get_scale() / 2.0**20)
        same = all(torch.equal(value, before[0][name]) for name, value in task.model.state_dict().items())
        assert same == (index == 5)
        if same:
            torch.testing.assert_close(everything_of(step), before, rtol=0, atol=0)
    assert scales == [1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    assert kinds == [(0, 1, False) if index == 5 else (0, 0, True) for index in range(8)]
    assert step.skipped_in_a_row() == 0


@pytest.mark.parametrize("recorded", [False, True])
def test_a_bad_loss_is_no_overflow_and_leaves_the_scale(recorders, recorded):
    task, scaling = LinearTask(dropout=0.0), scaler()
    step = step_of(task, scaler=scaling, recorded=recorded)
    scales = []
    for index in range(8):
        bad = index in (1, 3, 4)
        values = logged(step, task.examples(index) * (math.nan if bad else 1.0))
        assert (values["skipped"], values["overflow"]) == (bad, 0)
        scales.append(scaling.get_scale() / 2.0**20)
    assert scales == [1, 1, 1, 1, 1, 2, 2, 2]  # grown after the third good step


def test_gradients_that_overflow_without_a_scale_are_skipped_and_counted():
    """Else the scale would fall for ever and training never end."""
    task, scaling = LinearTask(dropout=0.0), scaler(4.0)
    bad_gradient(task)
    step = step_of(task, scaler=scaling)
    bad = task.examples(0)
    bad[0, 0] = 7.0
    kinds = [logged(step, bad) for _ in range(5)]
    assert [(values["overflow"], values["skipped"]) for values in kinds] == [(1, 0), (1, 0), (0, 1), (0, 1), (0, 1)]
    assert scaling.get_scale() == 1.0
    assert step.skipped_in_a_row() == 3


def test_a_step_that_raises_leaves_nothing_to_the_next(monkeypatch):
    """As a recording does that fails in the optimizer: the step runs again, and unscales its gradients again."""

    def fail(optimizer, skip):
        raise RuntimeError("cannot be recorded")

    failing, plain = LinearTask(dropout=0.0), LinearTask(dropout=0.0)
    steps = [step_of(task, scaler=scaler()) for task in (failing, plain)]
    with monkeypatch.context() as patch:
        patch.setattr(training.step, "step_unless_", fail)
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            logged(steps[0], failing.examples(0))
    for task, step in zip((failing, plain), steps, strict=True):
        logged(step, task.examples(0))
    torch.testing.assert_close(weights(failing), weights(plain), rtol=0, atol=0)


def test_gradients_are_reduced_once_per_step():
    """Several processes tell each other the gradients of the last of the accumulated batches, which hold all."""
    unsynced = []
    task = LinearTask()
    step = step_of(task, gradient_accumulation_steps=3)
    step._accelerator.no_sync = lambda model: (unsynced.append(task.last_step), nullcontext())[1]
    step(task.batch(index) for index in range(3))
    assert unsynced == [0, 1]


def test_a_step_names_its_phases_for_the_profiler():
    task = LinearTask()
    step = step_of(task, gradient_accumulation_steps=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(task.examples(index) for index in range(2))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert {name: counts.get(name) for name in ("data", "forward", "backward", "optimizer")} == {
        "data": 3,  # the end of the batches, too
        "forward": 2,
        "backward": 2,
        "optimizer": 1,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_graphs_are_refused_where_there_is_no_gpu():
    with pytest.raises(InputError, match=r"cuda_graphs = True needs a CUDA device, this run is on cpu"):
        loop_config(cuda_graphs=True)
    assert not loop_config().uses_cuda_graphs()


@pytest.mark.parametrize(
    ("changes", "num_processes", "problem"),
    [
        ({"optimizer": "adagrad"}, 1, 'optimizer "adamw", got "adagrad"'),
        ({"gradient_accumulation_steps": 2}, 1, "gradient_accumulation_steps = 1, got 2"),
        ({}, 4, "a single process, this run has 4"),
    ],
)
def test_graphs_that_cannot_be_had_are_refused_only_when_insisted_on(monkeypatch, changes, num_processes, problem):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loop_config().uses_cuda_graphs()
    assert not loop_config(**changes).uses_cuda_graphs(num_processes)
    assert not loop_config(cuda_graphs=False).uses_cuda_graphs()
    with pytest.raises(InputError, match=f"LoopConfig.cuda_graphs = True needs {problem}"):
        loop_config(**changes, cuda_graphs=True).uses_cuda_graphs(num_processes)


def test_checks_of_values_on_the_device_leave_no_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ops.checks._DEBUG", True)
    assert not loop_config().uses_cuda_graphs()
    assert ops.graphs.recorder_for(torch.device("cuda")) is None
    with pytest.raises(InputError, match=r"cuda_graphs = True needs OPS_DEBUG unset"):
        loop_config(cuda_graphs=True)


def test_accelerate_launch_cpu_computes_on_the_processor_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert uses_cuda()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not uses_cuda()
    assert not loop_config().uses_cuda_graphs()
    with pytest.raises(InputError, match=r'mixed_precision = "fp16" needs a CUDA device, this run is on cpu'):
        loop_config(mixed_precision="fp16")


@pytest.mark.parametrize(("amx", "expected"), [(True, "bf16"), (False, "no")])
def test_automatic_precision_on_a_processor_follows_amx(monkeypatch, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert loop_config().precision_on(torch.device("cpu")) == expected
    assert loop_config().precision_on(torch.device("cuda")) == "fp16"
    assert loop_config(mixed_precision="no").precision_on(torch.device("cuda")) == "no"


def test_bf16_is_refused_on_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(InputError, match=r'mixed_precision = "bf16" needs AVX512-BF16 or AMX'):
        loop_config(mixed_precision="bf16")
