"""Jagged batches from prepared histories: vectorised gathers, no loop over rows.

A training batch is a pure function of (seed, step, process), so resuming needs no sampler state. On a CUDA device the
histories lie where the model is, and a step sends only the numbers of its examples there.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.joined_rows import RowMatrix
from data.mapped_rows import exceeds_memory, gather_rows, is_memory_mapped
from data.read_ahead import ReadAhead
from data.schemas import Histories, InputError, Ranges, SeqBatch, Split

CPU = torch.device("cpu")

_SAMPLED_STEPS = 16
"""From whose sizes the capacities of batches are chosen."""
_HELD_OUT_STREAM = 2
"""Tells the random numbers of `held_out_rows` from those of epochs (0) and windows (1)."""
_COPIED_ROWS = 65_536
"""Rows copied to a device at once."""


class ExampleStrategy(enum.Enum):
    """Which (context, target) pairs of a training range one epoch visits.

    EVERY_PREFIX: every item after the first of a range is a target once, with all that precedes it as context.
    RANDOM_WINDOW: one pair per range, context start and target drawn anew in every epoch.
    LAST_ONLY: the last item of a range is its only target.
    """

    EVERY_PREFIX = "every_prefix"
    RANDOM_WINDOW = "random_window"
    LAST_ONLY = "last_only"


@dataclass(frozen=True, eq=False)
class Examples:
    """Where the examples of a batch lie in the histories, and the sizes that the host has to know of their batch.

    Attributes:
        places: [3, B] int32: history rows, first positions, and positions of the targets.
        num_items: T of the packed batch, at least the sum of the context lengths.
        max_len: no context is longer.
    """

    places: Tensor
    num_items: int
    max_len: int

    def __len__(self) -> int:
        return self.places.shape[1]

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples for another device; the copy does not wait for a GPU."""
        return replace(self, places=self.places.to(device, non_blocking=torch.device(device).type == "cuda"))

    @classmethod
    def of(cls, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray, max_history: int) -> "Examples":
        """Items [begin, end) of each row, cut to the last max_history, with item `end` as target."""
        begins = np.maximum(begins, ends - max_history)
        lengths = ends - begins
        places = torch.from_numpy(np.stack([rows, begins, ends]).astype(np.int32))
        return cls(places, num_items=int(lengths.sum()), max_len=int(lengths.max()))


@dataclass(frozen=True, eq=False)
class JaggedGather:
    """Packs parts of histories into batches on the device where the histories live, without waiting for it."""

    histories: Histories

    def __call__(self, examples: Examples) -> SeqBatch:
        """The batch of examples that lie on the histories' device.

        Items beyond the sum of the lengths belong to no row; they are 0.
        """
        rows, begins, ends = examples.places
        row_starts = self.histories.offsets[rows].long()
        offsets = torch.nn.functional.pad((ends - begins).cumsum(0, dtype=torch.int32), (1, 0))
        positions = torch.arange(examples.num_items, dtype=torch.int32, device=offsets.device)
        row_of = torch.bucketize(positions, offsets[1:], right=True)  # B in the tail
        sources = (row_starts + begins - offsets[:-1])[row_of.clamp(max=len(examples) - 1)] + positions
        is_tail = row_of == len(examples)
        item_ids = self.histories.item_ids[sources.masked_fill(is_tail, 0)].masked_fill(is_tail, 0)
        return SeqBatch(
            item_ids=item_ids.long(),
            offsets=offsets,
            max_len=examples.max_len,
            user_hashes=self.histories.user_hashes[rows],
            targets=self.histories.item_ids[row_starts + ends].long(),
        )


class ShuffledEpochs:
    """An endless stream of shuffled epochs over numbered examples, addressed by step.

    Args:
        num_examples: examples per epoch.
        batch_size: examples per process and step; a batch may cross an epoch's end.
        seed: fixes the order.
        run_length: consecutive examples that stay together; runs begin elsewhere in every epoch.
        process_index, num_processes: this process's share of each global batch.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        *,
        run_length: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size < 1 or run_length < 1:
            raise InputError(f"batch_size and run_length must be at least 1, got {batch_size} and {run_length}.")
        self.num_examples = num_examples
        self._run_length = run_length
        self._batch_size = batch_size
        self._seed = seed
        self._process_index = process_index
        self._num_processes = num_processes
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def examples(self, step: int) -> list[tuple[int, np.ndarray]]:
        """(epoch, example numbers) of a step, one entry per epoch that the batch touches."""
        first = (step * self._num_processes + self._process_index) * self._batch_size
        epochs, positions = np.divmod(np.arange(first, first + self._batch_size), self.num_examples)
        return [(int(epoch), self._order(int(epoch))[positions[epochs == epoch]]) for epoch in np.unique(epochs)]

    def _draw_order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch, 0])
        if self._run_length == 1:
            return generator.permutation(self.num_examples)
        starts = generator.permutation(np.arange(0, self.num_examples, self._run_length))
        order = (starts[:, None] + np.arange(self._run_length)).ravel()
        return (order[order < self.num_examples] + generator.integers(self.num_examples)) % self.num_examples


@dataclass(frozen=True, eq=False)
class _StepRows:
    """Row numbers of each step and their features on the host; apart from `FeatureBatches`, so that a thread that
    reads ahead does not keep it alive.
    """

    features: RowMatrix
    rows: np.ndarray | None
    epochs: ShuffledEpochs
    from_disk: bool

    def numbers(self, step: int) -> np.ndarray:
        """[B] rows of the features."""
        chosen = np.concatenate([examples for _, examples in self.epochs.examples(step)])
        return chosen if self.rows is None else self.rows[chosen]

    def values(self, step: int) -> Tensor:
        """[B, D] float32."""
        return torch.from_numpy(gather_rows(self.features, self.numbers(step), from_disk=self.from_disk))


class FeatureBatches:
    """Batches of feature rows, read from memory or from memory-mapped files.

    Memory maps stay where they are, and a thread reads the next batches while the present one is trained on.

    Args:
        features: [N, D] numbers: an array, a memory map, or several joined.
        batch_size: rows per process and step.
        seed: fixes the order.
        rows: [M] numbers of the rows to take, each once; None: all.
        run_length: rows that follow each other in `rows` and come into batches together, see `ShuffledEpochs`.
        device: where batches are wanted; the matrix is copied there if it fits into a quarter of a GPU's free memory.
        prefetch: batches of a memory map read ahead; 0 reads each when it is asked for.
        process_index, num_processes: this process's share of each global batch.

    Raises:
        InputError: if there are no rows, or numbers of rows that the features do not have.
    """

    def __init__(
        self,
        features: RowMatrix,
        batch_size: int,
        seed: int,
        *,
        rows: np.ndarray | None = None,
        run_length: int = 1,
        device: torch.device = CPU,
        prefetch: int = 2,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if prefetch < 0:
            raise InputError(f"prefetch must be at least 0, got {prefetch}.")
        self.num_rows = _num_chosen(rows, len(features))
        self._device = device
        self._resident = _copied(features, device) if _fits(features.nbytes, device) else None
        epochs = ShuffledEpochs(
            self.num_rows,
            batch_size,
            seed,
            run_length=run_length,
            process_index=process_index,
            num_processes=num_processes,
        )
        self._steps = _StepRows(features, rows, epochs, from_disk=exceeds_memory(features))
        self._values = ReadAhead(self._steps.values, prefetch if is_memory_mapped(features) else 0)

    def batch(self, step: int) -> Tensor:
        """[B, D] float32 rows of one step; the same arguments always give the same batch."""
        return self.pack(self.draw(step))

    def draw(self, step: int) -> Tensor:
        """What a step sends to the device: [B] row numbers where the matrix lies there, else the rows."""
        if self._resident is not None:
            return _pinned(torch.from_numpy(self._steps.numbers(step)), self._device)
        # Pinned here and not by the thread: a thread must not call CUDA while this one records a graph.
        return _pinned(self._values(step), self._device)

    def row_numbers(self, step: int) -> np.ndarray:
        """[B] int64 numbers of the rows of one step."""
        return self._steps.numbers(step)

    def pack(self, drawn: Tensor) -> Tensor:
        """[B, D] float32 rows of what was drawn."""
        return drawn if self._resident is None else self._resident[drawn.to(self._device)].float()


class TrainingBatches:
    """Jagged training batches: shuffled epochs over the examples of a split's training ranges.

    With `fixed_capacity`, batches come in few shapes, as recordings and compilers need them: the number of items is
    rounded up to a multiple of a sixteenth of its mean (a standard deviation where that is more; in any case a
    multiple of 128), by a tail that belongs to no row. On Amazon Beauty at batch size 256 that is 4% more items,
    in seven shapes.

    Args:
        histories: where the items are.
        ranges: the training role of a split.
        strategy: how ranges become examples.
        max_history: items kept in front of a target.
        batch_size: examples per process and step.
        seed: fixes order and windows.
        device: where batches are wanted; the histories are copied there if they fit into a quarter of a GPU's free
            memory.
        fixed_capacity: see above.
        process_index, num_processes: this process's share of each global batch.
    """

    def __init__(
        self,
        histories: Histories,
        ranges: Ranges,
        *,
        strategy: ExampleStrategy,
        max_history: int,
        batch_size: int,
        seed: int,
        device: torch.device = CPU,
        fixed_capacity: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if max_history < 1:
            raise InputError(f"max_history must be at least 1, got {max_history}.")
        usable = ranges.ends > ranges.begins
        self._rows, self._begins, self._ends = (
            field[usable].cpu().numpy().astype(np.int64) for field in (ranges.rows, ranges.begins, ranges.ends)
        )
        if len(self._rows) == 0:
            raise InputError("no training range holds two items, so there is nothing to predict. Check the data set.")
        self._strategy = strategy
        self._max_history = max_history
        self._seed = seed
        self._device = device
        self._gather = JaggedGather(_near(histories, device))
        self._is_near = self._gather.histories.item_ids.device.type == device.type
        self._example_ends = np.cumsum(self._ends - self._begins)
        self.num_examples = int(self._example_ends[-1]) if strategy is ExampleStrategy.EVERY_PREFIX else len(self._rows)
        self._epochs = ShuffledEpochs(
            self.num_examples, batch_size, seed, process_index=process_index, num_processes=num_processes
        )
        self._epoch_windows = lru_cache(maxsize=2)(self._draw_epoch_windows)
        self._bucket = self._choose_bucket() if fixed_capacity else None

    def batch(self, step: int) -> SeqBatch:
        """The batch of one step; the same arguments always give the same batch."""
        return self.pack(self.draw(step))

    def draw(self, step: int) -> Examples | SeqBatch:
        """What a step sends to the device: examples where the histories lie there, else the packed batch."""
        examples = self._examples(step)
        if self._bucket is not None:
            num_items = -(-examples.num_items // self._bucket) * self._bucket
            examples = replace(examples, num_items=num_items, max_len=self._max_history)
        if self._is_near:
            return replace(examples, places=_pinned(examples.places, self._device))
        packed = self._gather(examples)
        assert packed.targets is not None
        return replace(
            packed,
            item_ids=_pinned(packed.item_ids, self._device),
            offsets=_pinned(packed.offsets, self._device),
            user_hashes=_pinned(packed.user_hashes, self._device),
            targets=_pinned(packed.targets, self._device),
        )

    def pack(self, drawn: Examples | SeqBatch) -> SeqBatch:
        """The batch of what was drawn, on the device where it is wanted."""
        if isinstance(drawn, SeqBatch):
            return drawn.to(self._device)
        return self._gather(drawn.to(self._device))

    def _choose_bucket(self) -> int:
        sums = np.array([self._examples(step).num_items for step in range(_SAMPLED_STEPS)])
        return max(round(max(sums.mean() / 16, sums.std()) / 128), 1) * 128

    def _examples(self, step: int) -> Examples:
        parts = [self._ranges_of(epoch, examples) for epoch, examples in self._epochs.examples(step)]
        rows, begins, ends = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return Examples.of(rows, begins, ends, self._max_history)

    def _ranges_of(self, epoch: int, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """History rows, context begins and target positions of an epoch's examples."""
        if self._strategy is ExampleStrategy.EVERY_PREFIX:
            ranges = np.searchsorted(self._example_ends, examples, side="right")
            targets = self._ends[ranges] - (self._example_ends[ranges] - 1 - examples)
            return self._rows[ranges], self._begins[ranges], targets
        if self._strategy is ExampleStrategy.RANDOM_WINDOW:
            begins, targets = self._epoch_windows(epoch)
            return self._rows[examples], begins[examples], targets[examples]
        return self._rows[examples], self._begins[examples], self._ends[examples]

    def _draw_epoch_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Two distinct positions per range, uniform over the pairs: context start and target."""
        generator = np.random.default_rng([self._seed, epoch, 1])
        first = generator.integers(self._begins, self._ends + 1)
        second = generator.integers(self._begins, self._ends)
        second += second >= first
        return np.minimum(first, second), np.maximum(first, second)


def evaluation_batches(
    histories: Histories, ranges: Ranges, *, max_history: int, batch_size: int
) -> Iterator[SeqBatch]:
    """Batches of every range in order, each with its target."""
    gather = JaggedGather(histories)
    rows, begins, ends = (field.cpu().numpy() for field in (ranges.rows, ranges.begins, ranges.ends))
    for start in range(0, len(ranges), batch_size):
        part = slice(start, start + batch_size)
        examples = Examples.of(rows[part], begins[part], ends[part], max_history)
        yield gather(examples.to(histories.item_ids.device))


def cold_items(histories: Histories, split: Split, num_items: int) -> Tensor:
    """[N] bool, true for items that no training range of the split contains."""
    cold = torch.ones(num_items, dtype=torch.bool)
    cold[histories.item_ids[split.train.visible(histories)].long()] = False
    return cold


def held_out_rows(num_rows: int, share: float, seed: int) -> np.ndarray:
    """Rows that training leaves out, to validate on: at least one where the share is not 0, and never all.

    Args:
        num_rows: N, of which to choose.
        share: how many of them.
        seed: of the choice, which is independent of the batches' order under the same seed.

    Returns:
        [M] int64 row numbers, ascending.

    Raises:
        InputError: if the share is not in [0, 1), or leaves no row to train on.
    """
    if not 0 <= share < 1:
        raise InputError(f"the share of held-out rows must lie in [0, 1), got {share}.")
    count = max(round(share * num_rows), 1) if share > 0 else 0
    if count >= num_rows:
        raise InputError(f"holding out {count} of {num_rows} rows leaves none to train on. Lower the share.")
    order = np.random.default_rng([seed, 0, _HELD_OUT_STREAM]).permutation(num_rows)
    return np.sort(order[:count])


def _num_chosen(rows: np.ndarray | None, num_rows: int) -> int:
    """How many of the rows are chosen, at least one, and all of which must exist."""
    if num_rows == 0:
        raise InputError("the features have no rows, so there is nothing to train on. Check the data set.")
    if rows is None:
        return num_rows
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0:
        raise InputError(f"rows expected at least one row number, got {rows.dtype} of shape {list(rows.shape)}.")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= num_rows:
        raise InputError(f"rows expected numbers from 0 to {num_rows - 1}, got {low if low < 0 else high}.")
    return len(rows)


def _copied(features: RowMatrix, device: torch.device) -> Tensor:
    """The features on a device, copied in blocks, so that host memory never holds them whole."""
    copied: Tensor | None = None
    for begin in range(0, len(features), _COPIED_ROWS):
        block = torch.from_numpy(np.array(features[begin : begin + _COPIED_ROWS]))
        if copied is None:
            copied = torch.empty(len(features), features.shape[1], dtype=block.dtype, device=device)
        copied[begin : begin + len(block)] = block
    assert copied is not None
    return copied


def _near(histories: Histories, device: torch.device) -> Histories:
    """The histories on a device if they fit; timestamps, which no batch holds, stay where they are."""
    names = ("offsets", "item_ids", "user_hashes")
    if not _fits(sum(getattr(histories, name).nbytes for name in names), device):
        return histories
    return replace(histories, **{name: getattr(histories, name).to(device) for name in names})


def _fits(num_bytes: int, device: torch.device) -> bool:
    """Whether data may lie on the device for good: in a quarter of the free memory of a GPU, never elsewhere."""
    return device.type == "cuda" and 4 * num_bytes <= torch.cuda.mem_get_info(device)[0]


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In host memory from which a GPU copies while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
