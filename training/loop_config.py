"""How to train: steps, rates, precision, and when to log, evaluate, save and stop."""

import math
import platform
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from data.schemas import InputError
from ops.checks import waits_for_devices
from training.checks import require_at_least
from training.parameter_groups import ParameterGroup
from training.processes import uses_cuda
from training.schedules import ScheduleName

_ADDED_LATER = ("parameter_groups", "average_decay", "max_skipped_steps")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train.

    Attributes:
        num_steps: optimizer steps.
        gradient_accumulation_steps: batches per optimizer step; their mean loss counts.
        learning_rate: after warm-up, before decay.
        schedule: see schedules.py.
        parameter_groups: parameters that are trained with another rate or weight decay; a parameter belongs to the
            first group that names it.
        max_grad_norm: gradients are scaled down to this norm; None leaves them as they are.
        average_decay: evaluate and keep the moving average of the weights, of which a step keeps this share; None
            evaluates the weights themselves.
        max_skipped_steps: in a row: a step whose loss or gradient is not finite changes nothing and is counted; after
            so many of them training stops with an error.
        mixed_precision: "auto" is fp16 on CUDA, bf16 on processors with AMX, and none elsewhere, where it gains
            little; fp16 needs CUDA, bf16 a processor or GPU that computes in it. Evaluation is in fp32.
        cuda_graphs: replay the whole training step as one launch. "auto" does so wherever it can: AdamW on one CUDA
            device without gradient accumulation and without OPS_DEBUG. False never, True insists.
        eval_every, checkpoint_every, log_every: steps.
        patience: evaluations without improvement after which training stops; None never.
        keep_checkpoints: newest ones that stay on disk.
        max_minutes: budget of training time, earlier parts of a resumed run included; None is unlimited.

    Raises:
        InputError: for a value out of range, or a precision or graphs that this machine lacks.
    """

    num_steps: int
    learning_rate: float
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "adagrad"] = "adamw"
    weight_decay: float = 0.0
    parameter_groups: tuple[ParameterGroup, ...] = ()
    schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    average_decay: float | None = None
    max_skipped_steps: int = 10
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    cuda_graphs: bool | Literal["auto"] = "auto"
    eval_every: int = 1000
    patience: int | None = None
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        counts = "num_steps gradient_accumulation_steps eval_every patience log_every checkpoint_every"
        counts += " keep_checkpoints max_skipped_steps"
        require_at_least(1, "LoopConfig", **{name: getattr(self, name) for name in counts.split()})
        require_at_least(0, "LoopConfig", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        for name in ("learning_rate", "max_grad_norm", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"LoopConfig.{name} expected a positive number, got {value}.")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise InputError(f"LoopConfig.average_decay expected a share in (0, 1), got {self.average_decay}.")
        _check_precision(self.mixed_precision)
        self.uses_cuda_graphs()

    def to_dict(self) -> dict[str, Any]:
        """What decides the weights, as plain values; settings that came later are left out at their defaults.

        Two runs whose dictionaries are equal train alike: CUDA graphs change how a run computes, not what.
        """
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "cuda_graphs" and not (name in _ADDED_LATER and value == defaults[name])
        }

    def for_trial(self, num_steps: int) -> "LoopConfig":
        """The same training cut to its first steps, which ends in an evaluation and a checkpoint.

        Steps run one by one: recording them as CUDA graphs would hide what they consist of.
        """
        return replace(
            self,
            num_steps=num_steps,
            eval_every=num_steps,
            checkpoint_every=num_steps,
            log_every=min(self.log_every, num_steps),
            patience=None,
            max_minutes=None,
            cuda_graphs=False,
        )

    def precision_on(self, device: torch.device) -> str:
        """What "auto" means on a device; else the precision that was set."""
        if self.mixed_precision != "auto":
            return self.mixed_precision
        if device.type == "cuda":
            return "fp16"
        return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "no"

    def uses_cuda_graphs(self, num_processes: int = 1) -> bool:
        """Whether training steps are recorded, on this machine and among so many processes.

        Raises:
            InputError: if they must be and cannot.
        """
        problem = self._graphs_problem(num_processes)
        if self.cuda_graphs is True and problem is not None:
            raise InputError(f'LoopConfig.cuda_graphs = True needs {problem}. Use "auto" or False.')
        return bool(self.cuda_graphs) and problem is None

    def _graphs_problem(self, num_processes: int) -> str | None:
        if not uses_cuda():
            return "a CUDA device, this run is on cpu"
        if waits_for_devices():
            return "OPS_DEBUG unset, since its checks wait for the device"
        if self.optimizer != "adamw":
            return f'optimizer "adamw", got "{self.optimizer}"'
        if self.gradient_accumulation_steps != 1:
            return f"gradient_accumulation_steps = 1, got {self.gradient_accumulation_steps}"
        return f"a single process, this run has {num_processes}" if num_processes > 1 else None


def _check_precision(mixed_precision: str) -> None:
    """Accelerate ignores fp16 on the CPU without a word; bf16 runs on any processor, slower than fp32 on most."""
    if mixed_precision == "fp16" and not uses_cuda():
        raise InputError(
            'LoopConfig.mixed_precision = "fp16" needs a CUDA device, this run is on cpu. Use "auto", "no" or "bf16".'
        )
    if mixed_precision == "bf16" and uses_cuda() and not torch.cuda.is_bf16_supported():
        raise InputError(f'{torch.cuda.get_device_name()} has no bf16. Use mixed_precision "auto" or "fp16".')
    if mixed_precision == "bf16" and not uses_cuda() and not processor_has_bf16():
        raise InputError(
            'LoopConfig.mixed_precision = "bf16" needs AVX512-BF16 or AMX, which this processor lacks: it would be '
            'slower than fp32. Use "auto" or "no".'
        )


def processor_has_bf16() -> bool:
    """Whether the processor multiplies bf16 by itself."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
