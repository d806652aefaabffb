from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from data.schemas import InputError
from tests.training.tasks import CPU, QUANTIZERS, retrieval_task, rqvae_task
from tests.training.tiny import loop_config
from training import memory
from training.loop_config import LoopConfig
from training.memory import MemoryEstimate, estimate_memory
from training.optimizers import build_optimizer
from training.task import Task

ROWS, WIDTH, OUT = 5, 8, 4
FLOAT = 4


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, 3 * x.square())
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return ctx.saved_tensors[1] * gradients[0]


class SmallTask:
    """A linear map; its rows are kept by it, and its outputs twice by `Cube`: themselves and their squares."""

    selection_metric = "valid/error"
    higher_is_better = False

    def __init__(self) -> None:
        self.model: nn.Module = nn.Linear(WIDTH, OUT, bias=False)
        self.model.register_buffer("counts", torch.zeros(3))

    def batch(self, step: int) -> Tensor:
        assert step == 0
        return torch.ones(ROWS, WIDTH)

    def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        twice = model(batch) + model(batch[:])
        return {"loss": Cube.apply(twice).sum()}

    def item_keys(self, step: int) -> list[str]:
        raise AssertionError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise AssertionError


def test_numbers_by_hand() -> None:
    estimate = estimate_memory(SmallTask(), loop_config(average_decay=0.9), CPU)
    weights = FLOAT * WIDTH * OUT
    assert estimate.weights == weights + FLOAT * 3
    assert (estimate.gradients, estimate.moments, estimate.averages) == (weights, 2 * weights, weights)
    assert estimate.checkpoint == 4 * weights + FLOAT * 3
    assert estimate.activations == FLOAT * ROWS * (WIDTH + 2 * OUT)  # the batch once, although it is kept twice
    assert estimate.total == 9 * weights + FLOAT * (3 + 3 + ROWS * (WIDTH + 2 * OUT))


@pytest.mark.parametrize("optimizer", get_args(get_type_hints(LoopConfig)["optimizer"]))
def test_moments_are_those_of_the_optimizer(optimizer: str) -> None:
    config, task = loop_config(optimizer=optimizer), rqvae_task("ema", num_batches=1)
    estimate = estimate_memory(task, config, CPU)
    built = build_optimizer(task.model, config, recorded=False)
    task.loss(task.model, task.batch(0))["loss"].backward()
    built.step()
    moments = [value for state in built.state.values() for name, value in state.items() if name != "step"]
    assert estimate.moments == sum(value.nbytes for value in moments)
    assert estimate.gradients == sum(
        parameter.grad.nbytes for parameter in task.model.parameters() if parameter.grad is not None
    )


def trained_weights(task: Task, *, estimated: bool) -> dict[str, Tensor]:
    """After three steps, which draw dropout, noise and restarts."""
    optimizer = build_optimizer(task.model, loop_config(), recorded=False)
    task.model.train()
    torch.manual_seed(7)
    if estimated:
        assert estimate_memory(task, loop_config(), CPU).activations > 0
        assert all(parameter.grad is None for parameter in task.model.parameters())
    for step in range(3):
        task.loss(task.model, task.batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in task.model.state_dict().items()}


@pytest.mark.parametrize("name", ["retrieval", *QUANTIZERS])
def test_training_goes_as_without_an_estimate(name: str) -> None:
    def task() -> Task:
        return retrieval_task(fixed_capacity=False) if name == "retrieval" else rqvae_task(name, num_batches=10)

    expected = trained_weights(task(), estimated=False)
    torch.testing.assert_close(trained_weights(task(), estimated=True), expected, rtol=0, atol=0)


def test_modes_of_modules_are_put_back() -> None:
    task = retrieval_task(fixed_capacity=False)
    task.model.eval()
    task.model.get_submodule("encoder").train()
    before = [module.training for module in task.model.modules()]
    estimate_memory(task, loop_config(), CPU)
    assert [module.training for module in task.model.modules()] == before


def test_half_precision_takes_less() -> None:
    task = retrieval_task(fixed_capacity=False)
    full = estimate_memory(task, loop_config(mixed_precision="no"), CPU)
    config: Any = SimpleNamespace(optimizer="adamw", average_decay=None, precision_on=lambda device: "bf16")
    half = estimate_memory(task, config, CPU)
    assert half.weights == full.weights
    assert half.activations < 0.9 * full.activations


ESTIMATE = MemoryEstimate(
    device="cuda",
    weights=10**9,
    gradients=10**9,
    moments=2 * 10**9,
    averages=0,
    checkpoint=0,
    activations=10**8,
    free=None,
)


def test_one_line_for_people() -> None:
    line = "training takes about 4.1 GB on cuda: weights 1.0 GB, gradients 1.0 GB, moments 2.0 GB, activations 100.0 MB"
    assert ESTIMATE.describe() == line
    assert replace(ESTIMATE, free=31 * 10**8).describe() == f"{line}; 3.1 GB free"
    assert ESTIMATE.as_json()["total"] == 4_100_000_000


def test_a_warning_where_it_does_not_fit() -> None:
    tight = replace(ESTIMATE, free=31 * 10**8 - 1)
    assert not tight.fits
    assert tight.describe().startswith("warning: training takes about 4.1 GB")
    assert "Lower train.batch_size" in tight.describe()


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="free memory is known on Linux alone")
def test_free_memory_is_that_of_the_machine() -> None:
    free = estimate_memory(SmallTask(), loop_config(), CPU).free
    assert free is not None
    assert 2**20 < free < 2**50


def test_free_memory_may_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "absent")
    estimate = estimate_memory(SmallTask(), loop_config(), CPU)
    assert estimate.free is None
    assert estimate.fits


def test_a_batch_that_does_not_fit() -> None:
    class TooLarge(SmallTask):
        def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(InputError, match=r"one batch does not fit into the memory of cpu .* Lower train.batch_size"):
        estimate_memory(TooLarge(), loop_config(), CPU)
