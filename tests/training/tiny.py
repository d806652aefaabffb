"""A task small enough to train in a test: linear regression through dropout."""

from pathlib import Path

import torch
from torch import Tensor, nn

from training.loop import TrainingResult, run_training
from training.loop_config import LoopConfig
from training.run_folder import RunFolder, RunOptions


class LinearTask:
    selection_metric = "valid/error"
    higher_is_better = False

    def __init__(self, *, dropout: float = 0.5, batch_size: int = 8, poisoned: range = range(0)) -> None:
        torch.manual_seed(11)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(dropout), nn.Linear(16, 1))
        self._batch_size = batch_size
        self._poisoned = poisoned
        self.evaluated: list[int] = []

    def examples(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(self._batch_size, 4, generator=generator)
        return torch.cat([x, x.sum(dim=1, keepdim=True)], dim=1)

    def batch(self, step: int) -> Tensor:
        self.last_step = step
        examples = self.examples(step)
        return examples * float("nan") if step in self._poisoned else examples

    def item_keys(self, step: int) -> list[str]:
        return [f"{step}.{row}" for row in range(self._batch_size)]

    def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        error = model(batch[:, :4]).squeeze(1) - batch[:, 4]
        return {"loss": error.square().mean(), "absolute": error.abs().mean()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.evaluated.append(getattr(self, "last_step", -1) + 1)
        torch.rand(3)  # draws of an evaluation must not change the training
        batch = torch.cat([self.examples(10_000 + index) for index in range(8)]).to(next(model.parameters()).device)
        return {"valid/error": float((model(batch[:, :4]).squeeze(1) - batch[:, 4]).abs().mean())}


def loop_config(**changes: object) -> LoopConfig:
    values: dict[str, object] = {
        "num_steps": 20,
        "learning_rate": 0.01,
        "eval_every": 10,
        "log_every": 5,
        "checkpoint_every": 5,
        "keep_checkpoints": 10,
    }
    return LoopConfig(**(values | changes))  # type: ignore[arg-type]


def train_tiny(
    root: Path, task: LinearTask, *, resume: str | None = None, overwrite: bool = False, **changes: object
) -> TrainingResult:
    run = RunFolder.open(root, RunOptions(resume=resume, overwrite=overwrite), seed=3)
    return run_training(task, loop_config(**changes), run, seed=3, resume=resume)


def weights(task: LinearTask) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.model.state_dict().items()}
