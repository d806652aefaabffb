"""The shipped tasks, recorded by a stand-in for CUDA graphs: what replays equals what runs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import ops
import ops.backend
import ops.checks
import ops.graphs
from tasks.rqvae import RqVaeTask
from tests.ops.recorders import TapeRecorder
from tests.training.tasks import CPU, QUANTIZERS, liger_task, retrieval_task, rqvae_task, sequence_task, train
from training.task import Task

NUM_STEPS = 12
PLAIN = SimpleNamespace(scaler=None, device=CPU, autocast=nullcontext, num_processes=1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Plain twins and no look at values, both of which a processor would allow itself."""
    monkeypatch.setattr(ops.checks, "_reads_values", lambda offsets: False)
    for module in (ops.backend, ops.layers, ops.losses, ops.attention, ops.codes, ops.jagged):
        if hasattr(module, "uses_cpu_path"):
            monkeypatch.setattr(module, "uses_cpu_path", lambda device_type, seed: False)


@pytest.fixture
def recorders(monkeypatch) -> list[TapeRecorder]:
    made = []

    def recorder_for(device):
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setattr(ops.graphs, "recorder_for", recorder_for)
    return made


def train_on_cpu(task: Task, *, recorded: bool) -> Tensor:
    return train(task, PLAIN, recorded=recorded, num_steps=NUM_STEPS)


def assert_same_training(plain: Task, recorded: Task, recorders: list[TapeRecorder]) -> None:
    expected, got = train_on_cpu(plain, recorded=False), train_on_cpu(recorded, recorded=True)
    assert recorders[0].log.count("replay") >= NUM_STEPS // 2
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(state(recorded.model), state(plain.model), rtol=0, atol=0)


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("task", [retrieval_task, liger_task, sequence_task])
def test_a_model_of_histories_trains_the_same_recorded(recorders, task):
    assert_same_training(task(fixed_capacity=True), task(fixed_capacity=True), recorders)


@pytest.mark.parametrize("task", [retrieval_task, liger_task, sequence_task])
def test_a_fixed_capacity_changes_nothing_but_rounding(task):
    exact, fixed = task(fixed_capacity=False, dropout=0.0), task(fixed_capacity=True, dropout=0.0)
    torch.testing.assert_close(
        train_on_cpu(fixed, recorded=False), train_on_cpu(exact, recorded=False), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(state(fixed.model), state(exact.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_rqvae_trains_the_same_recorded(recorders, quantizer):
    assert_same_training(*(rqvae_task(quantizer, num_batches=NUM_STEPS) for _ in range(2)), recorders)


def test_the_temperature_of_a_recorded_training_changes(recorders):
    """It would be the one of the third step for ever, were it a Python number."""

    class Frozen(RqVaeTask):
        def loss(self, model, batch):
            self.frozen = getattr(self, "frozen", float(batch.temperature))
            return super().loss(model, type(batch)(batch.drawn, torch.full_like(batch.temperature, self.frozen)))

    right, frozen = (rqvae_task("gumbel_softmax", num_batches=NUM_STEPS) for _ in range(2))
    frozen.__class__ = Frozen
    assert not torch.allclose(train_on_cpu(right, recorded=True), train_on_cpu(frozen, recorded=False), rtol=1e-3)
