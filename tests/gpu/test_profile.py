"""Profiles and memory estimates on a GPU; what can be tested without one is in tests/training."""

import json

import pytest
import torch
from torch.profiler import record_function

from benchmarks.demo_tasks import decoder_task
from tests.training.tiny import loop_config
from training.memory import estimate_memory
from training.profile import WARMUP_STEPS, StepProfile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_kernels_count_in_the_phase_that_launched_them(tmp_path, device):
    """Those of the backward pass come from a thread of autograd."""
    x = torch.ones(2048, 2048, device=device, requires_grad=True)
    with StepProfile(tmp_path, 3, device, every={}) as profile:
        for _ in range(WARMUP_STEPS + 3):
            with record_function("forward"):
                loss = (x @ x).sum()
            with record_function("backward"):
                loss.backward()
            profile.advance()
    numbers = json.loads((tmp_path / "profile.json").read_text())
    times = {name: phase["device_ms"] for name, phase in numbers["phases"].items()}
    assert times["backward"] > 1.2 * times["forward"] > 0  # two products, one product
    assert times["data"] == times["optimizer"] == 0
    assert numbers["kernels"]
    assert sum(times.values()) <= numbers["step_ms"]


def test_estimated_activations_are_what_is_allocated(device):
    config, task = loop_config(mixed_precision="fp16"), decoder_task()
    task.model.to(device).train()
    estimate = estimate_memory(task, config, device)
    before = torch.cuda.memory_allocated(device)
    with torch.autocast("cuda", dtype=torch.float16):
        losses = task.loss(task.model, task.batch(0).to(device))
    kept = torch.cuda.memory_allocated(device) - before
    assert losses["loss"].requires_grad
    assert estimate.activations == pytest.approx(kept, rel=0.2)
