"""Training steps that are recorded and replayed, by a stand-in for CUDA graphs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import ops.graphs
from data.schemas import InputError
from tests.ops.recorders import TapeRecorder
from tests.training.tiny import LinearTask, loop_config, train_tiny, weights
from training.loop_config import LoopConfig
from training.optimizers import build_optimizer, load_optimizer_state_, optimizer_state, set_rate_
from training.processes import uses_cuda
from training.step import OptimizerStep
from training.window import Window


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


def scaled_step(*, recorded: bool) -> tuple[OptimizerStep, LinearTask, SimpleNamespace]:
    """A step with loss scaling as on a GPU."""
    task = LinearTask(dropout=0.0)
    config = loop_config(learning_rate=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"), autocast=nullcontext, num_processes=1)
    optimizer = build_optimizer(task.model, config, recorded=recorded)
    step = OptimizerStep(task, task.model, optimizer, accelerator=accelerator, config=config, recorded=recorded)
    return step, task, accelerator


@pytest.mark.parametrize("recorded", [False, True])
def test_an_overflow_skips_the_step_and_halves_the_scale(recorders, recorded):
    step, task, accelerator = scaled_step(recorded=recorded)
    window = Window(accelerator, overflow_allowed=True)
    scales, moved = [], []
    for index in range(8):
        before = weights(task)
        batch = task.examples(index)
        window.add(step([batch * 1e30 if index == 5 else batch]))
        scales.append(accelerator.scaler.get_scale())
        moved.append(any(not torch.equal(before[name], value) for name, value in weights(task).items()))
    assert moved == [index != 5 for index in range(8)]
    assert [scale / 2.0**20 for scale in scales] == [1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    sums = dict(zip(window._names, window._sums.tolist(), strict=True))
    assert sums["overflow"] == 1
    assert 0 < sums["norm"] < 1e6
    assert window.num_steps == 8


def test_rates_and_states_are_plain_numbers_where_they_leave_the_optimizer():
    model = torch.nn.Linear(2, 1)
    optimizer = build_optimizer(model, loop_config(learning_rate=0.5), recorded=True)
    rate = optimizer.param_groups[0]["lr"]
    set_rate_(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer_state(optimizer)
    assert state["param_groups"][0]["lr"] == 0.25
    assert optimizer.param_groups[0]["lr"] is rate

    plain = build_optimizer(model, loop_config(learning_rate=0.1, weight_decay=0.3), recorded=False)
    load_optimizer_state_(plain, state)
    group = plain.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["capturable"]) == (0.1, 0.3, False)
    load_optimizer_state_(optimizer, optimizer_state(plain))
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.param_groups[0]["capturable"]


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
