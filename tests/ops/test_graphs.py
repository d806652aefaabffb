from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ops.graphs
from ops.graphs import GraphedCall
from tests.ops.recorders import TapeRecorder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    x: Tensor
    power: int
    y: Tensor | None = None


@pytest.fixture
def recorder(monkeypatch):
    recorder = TapeRecorder()
    monkeypatch.setattr(ops.graphs, "recorder_for", lambda device: recorder)
    return recorder


def cubes_and_sum(pair: Pair) -> dict[str, Tensor]:
    total = pair.x.sum() if pair.y is None else pair.x.sum() + pair.y.sum()
    return {"powers": pair.x**pair.power, "total": total}


def graphed(function, **settings) -> GraphedCall:
    return GraphedCall(function, device=CPU, name="test", **settings)


def test_calls_warm_up_then_record_then_replay(recorder):
    call = graphed(cubes_and_sum, warmup=2)
    for index in range(5):
        x = torch.full((3,), float(index))
        result = call(Pair(x, 3))
        assert result["powers"].tolist() == [index**3.0] * 3
        assert float(result["total"]) == 3 * index
    assert recorder.log == ["run", "run", "record", "replay", "replay", "replay"]
    assert call.num_recorded == 1


def test_results_are_overwritten_by_the_next_call(recorder):
    call = graphed(lambda x: x + 1, warmup=1)
    call(torch.zeros(2))
    first = call(torch.zeros(2))
    second = call(torch.ones(2))
    assert second is first
    assert first.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "other",
    [
        Pair(torch.zeros(4), 2),
        Pair(torch.zeros(3, dtype=torch.float64), 2),
        Pair(torch.zeros(3), 3),
        Pair(torch.zeros(3), 2, torch.zeros(1)),
        torch.zeros(3),
    ],
)
def test_shapes_dtypes_values_and_kinds_are_recorded_apart(recorder, other):
    call = graphed(lambda batch: (batch if isinstance(batch, Tensor) else batch.x) * 1, warmup=1)
    for _ in range(2):
        call(Pair(torch.zeros(3), 2))
    recorder.log.clear()
    call(other)
    assert recorder.log == ["run"]
    call(other)
    assert recorder.log == ["run", "record", "replay"]
    assert call.num_recorded == 2


def test_modes_are_recorded_apart(recorder):
    call = graphed(lambda x: x * 2, warmup=1)
    for _ in range(2):
        call(torch.zeros(3), "training")
    call(torch.zeros(3), "evaluation")
    assert recorder.log == ["run", "record", "replay", "run"]


def test_every_batch_takes_effect_exactly_once(recorder):
    counter = torch.zeros(())

    def count(x: Tensor) -> Tensor:
        counter.add_(x.sum())
        return counter.clone()

    call = graphed(count)
    expected = 0.0
    for index in range(12):
        batch = torch.full((1 + index % 3,), float(index))
        expected += float(batch.sum())
        assert float(call(batch)) == expected
    assert call.num_recorded == 3


def test_batches_may_be_views_and_share_no_memory_with_the_recording(recorder):
    call = graphed(lambda x: x * 2, warmup=1)
    column = torch.arange(6.0).view(3, 2)[:, 1]
    expanded = torch.tensor([7.0]).expand(3)
    assert call(column).tolist() == [2.0, 6.0, 10.0]
    assert call(expanded).tolist() == [14.0, 14.0, 14.0]
    assert column.tolist() == [1.0, 3.0, 5.0]


def test_further_shapes_than_allowed_run_plainly_and_that_is_said_once(recorder, caplog):
    call = graphed(lambda x: x * 2, max_shapes=2, warmup=1)
    for _ in range(3):
        for size in (1, 2, 3, 4):
            assert call(torch.ones(size)).tolist() == [2.0] * size
    assert call.num_recorded == 2
    assert [record.getMessage() for record in caplog.records] == [
        "test: batches came in more than 2 shapes; further shapes run without CUDA graphs, slower. "
        "Use batches of fixed capacities."
    ]


def test_a_function_that_cannot_be_recorded_runs_plainly_and_loses_no_batch(recorder, caplog):
    weight = torch.zeros(())

    def waits(x: Tensor) -> float:
        weight.add_(x.sum())
        return float(weight)

    call = GraphedCall(waits, device=CPU, name="a waiting function", warmup=1)
    assert [call(torch.full((2,), float(value))) for value in range(5)] == [0.0, 2.0, 6.0, 12.0, 20.0]
    assert not call.records
    assert recorder.log == ["run", "record"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("a waiting function: runs without CUDA graphs, slower, since recording failed: Runtime")


def test_an_error_while_warming_up_is_the_callers(recorder):
    call = graphed(lambda x: x.reshape(3))
    with pytest.raises(RuntimeError, match="invalid for input of size 2"):
        call(torch.zeros(2))
    assert call.records


def test_recordings_are_dropped_when_memory_moves(recorder):
    weight = torch.nn.Parameter(torch.ones(2))
    call = graphed(lambda x: (x * weight.detach()).sum(), memory=[weight], warmup=1)
    assert [float(call(torch.ones(2))) for _ in range(3)] == [2.0, 2.0, 2.0]
    weight.data = torch.full((2,), 5.0)
    assert float(call(torch.ones(2))) == 10.0
    assert recorder.log[-1] == "run"


def test_weights_that_change_in_place_are_read_anew(recorder):
    weight = torch.ones(2)
    call = graphed(lambda x: (x * weight).sum(), memory=[weight], warmup=1)
    for value in range(1, 5):
        weight.fill_(value)
        assert float(call(torch.ones(2))) == 2.0 * value
    assert recorder.log.count("record") == 1


def test_random_numbers_are_new_at_every_replay(recorder):
    call = graphed(lambda x: torch.rand(4) + x, warmup=1)
    torch.manual_seed(0)
    drawn = [call(torch.zeros(4)).clone() for _ in range(4)]
    assert len({tuple(values.tolist()) for values in drawn}) == 4


def test_the_stand_in_keeps_python_numbers_as_a_graph_does(recorder):
    factor = 1.0
    call = graphed(lambda x: x * factor, warmup=1)
    call(torch.ones(1))
    call(torch.ones(1))
    factor = 5.0
    assert float(call(torch.ones(1))) == 1.0


def test_it_is_a_plain_call_when_switched_off_or_on_a_processor():
    for call in (graphed(lambda x: x + 1, enabled=False), graphed(lambda x: x + 1)):
        assert not call.records
        assert call(torch.zeros(1)).tolist() == [1.0]


def test_warm_up_is_at_least_one_call():
    with pytest.raises(ValueError, match="warmup of at least 1, got 0"):
        graphed(lambda x: x, warmup=0)
