"""How to train: steps, rates, precision, and when to log, evaluate, save and stop."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from data.schemas import InputError
from training.checks import require_at_least
from training.schedules import ScheduleName


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train.

    Attributes:
        num_steps: optimizer steps.
        gradient_accumulation_steps: batches per optimizer step; their mean loss counts.
        learning_rate: after warm-up, before decay.
        schedule: see schedules.py.
        max_grad_norm: gradients are scaled down to this norm; None leaves them as they are.
        mixed_precision: "auto" is fp16 on CUDA and none elsewhere; fp16 needs CUDA.
        eval_every, checkpoint_every, log_every: steps.
        patience: evaluations without improvement after which training stops; None never.
        keep_checkpoints: newest ones that stay on disk.
        max_minutes: budget of training time, earlier parts of a resumed run included; None is unlimited.

    Raises:
        InputError: for a value out of range, or a precision that this machine lacks.
    """

    num_steps: int
    learning_rate: float
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "adagrad"] = "adamw"
    weight_decay: float = 0.0
    schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    eval_every: int = 1000
    patience: int | None = None
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        counts = "num_steps gradient_accumulation_steps eval_every patience log_every checkpoint_every keep_checkpoints"
        require_at_least(1, "LoopConfig", **{name: getattr(self, name) for name in counts.split()})
        require_at_least(0, "LoopConfig", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        for name in ("learning_rate", "max_grad_norm", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"LoopConfig.{name} expected a positive number, got {value}.")
        _check_precision(self.mixed_precision)


def _check_precision(mixed_precision: str) -> None:
    """Accelerate ignores fp16 on the CPU without a word."""
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError(
            'LoopConfig.mixed_precision = "fp16" needs a CUDA device, this run is on cpu. Use "auto", "no" or "bf16".'
        )
    if mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError(f'{torch.cuda.get_device_name()} has no bf16. Use mixed_precision "auto" or "fp16".')
