"""Processes that share work: their order, their errors, and what is left of one process's results.

Threads stand for processes here, with an exchange of their own; `test_evaluation_under_torchrun` has real ones.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest

import evaluation.processes
from data.schemas import InputError
from evaluation.processes import ALONE, Processes

PATIENCE = 10.0
"""Seconds after which processes that wait for each other in vain have failed."""


class Exchange:
    """`all_gather_object` among threads, each of which has said which process it is."""

    def __init__(self, num_processes: int) -> None:
        self.barrier = threading.Barrier(num_processes, timeout=PATIENCE)
        self.given: list[Any] = [None] * num_processes
        self.local = threading.local()

    def __call__(self, gathered: list[Any], value: Any) -> None:
        self.given[self.local.index] = value
        self.barrier.wait()
        gathered[:] = self.given
        self.barrier.wait()


@pytest.fixture
def in_processes(monkeypatch):
    """Runs a function in each of several processes; gives what each returned or raised, in their order."""

    def run(num_processes: int, program: Callable[[Processes], Any]) -> list[Any]:
        exchange = Exchange(num_processes)
        monkeypatch.setattr(evaluation.processes, "all_gather_object", exchange)
        outcomes: list[Any] = ["hangs"] * num_processes

        def process(index: int) -> None:
            exchange.local.index = index
            try:
                outcomes[index] = program(Processes(index, num_processes))
            except Exception as error:
                outcomes[index] = error

        threads = [threading.Thread(target=process, args=[index]) for index in range(num_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        return outcomes

    return run


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 7, 15])
def test_every_process_gets_all_results_in_order_and_each_item_is_worked_on_once(
    in_processes, num_processes, num_items
):
    worked: list[tuple[int, int]] = []

    def program(processes):
        def work(item):
            worked.append((item, processes.process_index))
            return item * 10

        return list(processes.map(work, iter(range(num_items))))

    outcomes = in_processes(num_processes, program)
    assert outcomes == [[item * 10 for item in range(num_items)]] * num_processes
    assert sorted(worked) == [(item, item % num_processes) for item in range(num_items)]


def test_one_process_needs_no_group_and_works_lazily():
    worked: list[int] = []
    results = ALONE.map(lambda item: worked.append(item) or item, range(3))
    assert worked == []
    assert next(results) == 0
    assert worked == [0]


class OddError(Exception):
    """An exception that another process could not build again."""

    def __init__(self, *, detail: str) -> None:
        super().__init__(detail)


@pytest.mark.parametrize(
    ("error", "kind_elsewhere", "text_elsewhere"),
    [
        (InputError("bad row"), InputError, "bad row"),
        (OddError(detail="odd"), RuntimeError, "process 1 failed in the evaluation: OddError: odd"),
    ],
)
def test_an_error_of_one_process_ends_all_of_them_in_the_same_turn(in_processes, error, kind_elsewhere, text_elsewhere):
    worked: list[int] = []

    def program(processes):
        def work(item):
            worked.append(item)
            if item == 4:
                raise error
            return item

        return list(processes.map(work, range(100)))

    first, failed, last = in_processes(3, program)
    assert failed is error
    assert failed.__cause__ is None
    for outcome in (first, last):
        assert type(outcome) is kind_elsewhere
        assert str(outcome) == text_elsewhere
    assert sorted(worked) == list(range(6))  # two turns of three items, and nothing after them


def test_of_several_errors_the_first_items_is_the_one_that_all_processes_raise(in_processes):
    """It is the one that a process alone would have met."""

    def program(processes):
        def work(item):
            raise InputError(f"item {item}")

        return list(processes.map(work, range(3)))

    outcomes = in_processes(3, program)
    assert [str(outcome) for outcome in outcomes] == ["item 0"] * 3
    assert str(outcomes[2].__cause__) == "item 2"


def test_on_main_runs_once_and_its_error_reaches_all(in_processes):
    ran: list[int] = []

    def program(processes):
        processes.on_main(lambda: ran.append(processes.process_index))

        def full() -> None:
            raise InputError("full disk")

        processes.on_main(full)

    outcomes = in_processes(2, program)
    assert ran == [0]
    assert [str(outcome) for outcome in outcomes] == ["full disk"] * 2
