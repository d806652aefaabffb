"""CUDA graphs of whole training steps; what can be tested without a GPU is in tests/ops/test_graphs.py."""

import pytest
import torch

from ops.graphs import GraphedCall
from tests.training.tasks import QUANTIZERS, optimizer_step, retrieval_task, rqvae_task, sequence_task, train
from tests.training.tiny import LinearTask, loop_config, train_tiny, weights
from training.loop import _accelerator
from training.optimizers import set_rate_
from training.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_STEPS = 30
TASKS = ("retrieval", "retrieval with dropout", "sequence", *QUANTIZERS)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def build(name: str, device: torch.device):
    """A new task, the same every time."""
    if name.startswith("retrieval"):
        return retrieval_task(fixed_capacity=True, dropout=0.2 if "dropout" in name else 0.0, device=device)
    if name == "sequence":
        return sequence_task(fixed_capacity=True, dropout=0.2, device=device)
    return rqvae_task(name, num_batches=NUM_STEPS, device=device)


def accelerator_of(precision: str):
    return _accelerator(loop_config(mixed_precision=precision))


@pytest.mark.parametrize("name", TASKS)
def test_replayed_steps_equal_launched_ones(name, device):
    """Dropout and Gumbel noise too: a replay continues torch's generator where launches would."""
    accelerator = accelerator_of("no")
    plain, recorded = build(name, device), build(name, device)
    expected = train(plain, accelerator, recorded=False, num_steps=NUM_STEPS)
    got = train(recorded, accelerator, recorded=True, num_steps=NUM_STEPS)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_no_step_waits_for_the_device(name, precision, recorded, device):
    accelerator = accelerator_of(precision)
    task = build(name, device)
    step = optimizer_step(task, accelerator, recorded=recorded)
    window = Window(accelerator)
    for index in range(4 * NUM_STEPS):  # every capacity is recorded
        window.add(step([task.batch(index % NUM_STEPS)]))
    assert step._graphed.records == recorded
    if recorded:
        assert step._graphed.num_recorded == len(step._graphed._entries)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(NUM_STEPS):
            set_rate_(step._optimizer, 0.001 * (index + 1))
            window.add(step([task.batch(index)]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert window.read()["train/skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_memory_does_not_grow(name, device):
    accelerator = accelerator_of("fp16")
    task = build(name, device)
    step = optimizer_step(task, accelerator, recorded=True)
    window = Window(accelerator)

    def run(num_steps: int) -> int:
        for index in range(num_steps):
            window.add(step([task.batch(index % NUM_STEPS)]))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)

    before = run(4 * NUM_STEPS)
    num_recorded = step._graphed.num_recorded
    after = run(1000)
    assert step._graphed.num_recorded == num_recorded > 0
    assert after <= before + 2**16
    assert step._graphed.records


@pytest.mark.parametrize("recorded", [False, True])
def test_an_overflow_skips_the_step_and_lowers_the_scale(recorded):
    accelerator = accelerator_of("fp16")
    task = LinearTask(dropout=0.0)
    step = optimizer_step(task, accelerator, recorded=recorded)
    window = Window(accelerator)
    for index in range(12):
        window.add(step([task.examples(index)]))  # the first scales may overflow
    before, scale = weights(task), accelerator.scaler.get_scale()
    window.add(step([task.examples(12) * 1e3]))
    torch.testing.assert_close(weights(task), before, rtol=0, atol=0)
    assert accelerator.scaler.get_scale() == scale / 2
    window.add(step([task.examples(13)]))
    assert not torch.equal(weights(task)["0.weight"], before["0.weight"])
    assert dict(zip(window._names, window._sums.tolist(), strict=True))["overflow"] >= 1


def test_the_loop_trains_and_resumes_with_graphs_and_without(tmp_path):
    whole, resumed = LinearTask(), LinearTask()
    settings = {"mixed_precision": "no", "schedule": "cosine", "warmup_steps": 3, "num_steps": 40}
    train_tiny(tmp_path / "whole", whole, cuda_graphs=False, **settings)
    train_tiny(tmp_path / "cut", LinearTask(), cuda_graphs=True, **settings)
    torch.testing.assert_close(
        *(
            torch.load(tmp_path / name / "checkpoints/step_00000040/state.pt", weights_only=True)["model"]
            for name in ("cut", "whole")
        ),
        rtol=1e-3,
        atol=1e-4,
    )
    for path in (tmp_path / "cut/checkpoints").glob("step_*"):
        if path.name > "step_00000020":
            path.rename(tmp_path / path.name)
    train_tiny(tmp_path / "cut", resumed, resume="auto", cuda_graphs=False, **settings)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-3, atol=1e-4)


def test_a_failed_recording_leaves_other_recordings_and_random_numbers_whole(device, caplog):
    dropout = GraphedCall(lambda x: torch.dropout(x, 0.5, True), device=device, name="dropout")
    x = torch.ones(1 << 16, device=device)
    drawn = [dropout(x).clone() for _ in range(4)]

    failing = GraphedCall(lambda x: x * float(x.sum()), device=device, name="failing", warmup=1)
    assert [failing(torch.full((2,), value)).tolist() for value in (1.0, 2.0, 3.0)] == [
        [2.0] * 2,
        [8.0] * 2,
        [18.0] * 2,
    ]
    assert "failing: runs without CUDA graphs, slower, since recording failed" in caplog.text
    assert not failing.records

    assert 0.45 < float((torch.rand(1 << 16, device=device) < 0.5).float().mean()) < 0.55
    drawn += [dropout(x).clone() for _ in range(2)]
    assert dropout.records
    for index, values in enumerate(drawn):
        assert 0.45 < float((values == 0).float().mean()) < 0.55
        assert not any(torch.equal(values, other) for other in drawn[:index])
