"""Evaluation by several processes: each does its share, and all of them get everything, in the order of one.

Whole batches are dealt out, never parts of them: a batch is computed exactly as one process alone would compute it,
so that neither ids nor sums depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from torch.distributed import all_gather_object

from data.schemas import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that evaluate together; every one of them makes the same calls, in the same order.

    Several of them are those of `torch.distributed`'s default group, which exists by then.

    Attributes:
        process_index: which of them this is; 0 is the main one, the only one to write files and show progress.
        num_processes: how many there are; 1 works alone and needs no group.
    """

    process_index: int = 0
    num_processes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes and shows."""
        return self.process_index == 0

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """As the built-in `map`, the items dealt out in turn; every process gets the results of all.

        After each turn, an item per process, the results are exchanged: nobody waits longer than one item takes, and
        an error stops all of them at once.

        Args:
            work: what to do with an item; its result lies on the CPU and can be pickled.
            items: the same ones on every process; each goes through all of them, so they should be cheap to make.

        Raises:
            Exception: what `work` raised, from the first item that failed; where another process met it, an
                InputError of the same text if it was one, else a RuntimeError that names it.
        """
        remaining = iter(items)
        while turn := list(islice(remaining, self.num_processes)):
            yield from self._together(work, turn) if self.num_processes > 1 else [work(turn[0])]

    def on_main(self, action: Callable[[], None]) -> None:
        """Run an action on the main process; an error there is raised on all."""
        list(self.map(lambda run: run(), [action]))

    def _together(self, work: Callable[[Item], Result], turn: Sequence[Item]) -> list[Result]:
        """Results of up to one item per process."""
        mine: Any = None
        error: Exception | None = None
        if self.process_index < len(turn):
            try:
                mine = work(turn[self.process_index])
            except Exception as raised:  # the others have to hear of any
                mine, error = _Failure.of(raised, self.process_index), raised
        exchanged: list[Any] = [None] * self.num_processes
        all_gather_object(exchanged, mine)
        for failure in exchanged:
            if isinstance(failure, _Failure):
                if error is not None and failure == mine:
                    raise error
                raise failure.error() from error
        return exchanged[: len(turn)]


ALONE = Processes()


@dataclass(frozen=True)
class _Failure:
    """An error as other processes are told of it; the exception itself might not survive pickling."""

    process_index: int
    kind: str
    text: str
    is_input_error: bool

    @classmethod
    def of(cls, error: Exception, process_index: int) -> "_Failure":
        return cls(process_index, type(error).__name__, str(error), isinstance(error, InputError))

    def error(self) -> Exception:
        if self.is_input_error:
            return InputError(self.text)
        return RuntimeError(f"process {self.process_index} failed in the evaluation: {self.kind}: {self.text}")
