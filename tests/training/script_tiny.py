"""A training script as small as one can be; tests run it in a process of its own."""

import sys
import time
from dataclasses import dataclass

import gin

from tests.training.tiny import LinearTask
from training.cli import main
from training.gin_config import register
from training.loop import run_training
from training.loop_config import LoopConfig
from training.run_folder import RunFolder, RunOptions

register(LoopConfig)


@dataclass
class SlowTask(LinearTask):
    """Every batch but the first, of which memory is estimated too, and every evaluation takes a while."""

    step_seconds: float
    evaluation_seconds: float

    def __post_init__(self) -> None:
        super().__init__()

    def batch(self, step):
        print(f"batch {step}", file=sys.stderr, flush=True)
        time.sleep(self.step_seconds * (step > 0))
        return super().batch(step)

    def evaluate(self, model):
        print("evaluating", file=sys.stderr, flush=True)
        end = time.monotonic() + self.evaluation_seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return super().evaluate(model)


@gin.configurable(module="script_tiny")
def train(
    *,
    options: RunOptions,
    save_dir_root: str,
    loop: LoopConfig,
    seed: int = 3,
    step_seconds: float = 0.0,
    evaluation_seconds: float = 0.0,
    wandb_logging: bool = False,
) -> None:
    run = RunFolder.open(save_dir_root, options, seed=seed)
    task = SlowTask(step_seconds, evaluation_seconds)
    run_training(task, loop, run, seed=seed, resume=options.resume, wandb_logging=wandb_logging)


if __name__ == "__main__":
    sys.exit(main(train, "script_tiny"))
