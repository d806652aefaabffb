"""Jagged batches from prepared histories: vectorised gathers, no loop over rows.

A training batch is a pure function of (seed, step, process), so resuming needs no sampler state.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.schemas import Histories, InputError, Ranges, SeqBatch, Split


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
class JaggedGather:
    """Packs parts of histories into batches on the device where the histories live."""

    histories: Histories

    def __call__(self, rows: Tensor, begins: Tensor, ends: Tensor, max_history: int) -> SeqBatch:
        """Batch of items [begin, end) of each row, cut to the last max_history, with item `end` as target.

        Args:
            rows: [B] history rows.
            begins: [B] positions from the start of the row's history.
            ends: [B] positions of the targets.
            max_history: items kept per row.
        """
        row_starts = self.histories.offsets.long()[rows]
        begins = torch.maximum(begins.long(), ends.long() - max_history)
        lengths = ends.long() - begins
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        num_tokens = int(offsets[-1])
        shift = torch.repeat_interleave(row_starts + begins - offsets[:-1], lengths, output_size=num_tokens)
        positions = shift + torch.arange(num_tokens, device=lengths.device)
        return SeqBatch(
            item_ids=self.histories.item_ids[positions].long(),
            offsets=offsets,
            max_len=int(lengths.max()),
            user_hashes=self.histories.user_hashes[rows],
            targets=self.histories.item_ids[row_starts + ends].long(),
        )


class ShuffledEpochs:
    """An endless stream of shuffled epochs over numbered examples, addressed by step.

    Args:
        num_examples: examples per epoch.
        batch_size: examples per process and step; a batch may cross an epoch's end.
        seed: fixes the order.
        process_index, num_processes: this process's share of each global batch.
    """

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        self.num_examples = num_examples
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
        return np.random.default_rng([self._seed, epoch, 0]).permutation(self.num_examples)


class FeatureBatches:
    """Batches of feature rows, read from memory or a memory-mapped matrix.

    Args:
        features: [N, D] float matrix.
        batch_size: rows per process and step.
        seed: fixes the order.
        process_index, num_processes: this process's share of each global batch.
    """

    def __init__(
        self, features: np.ndarray, batch_size: int, seed: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self._features = features
        self._epochs = ShuffledEpochs(
            len(features), batch_size, seed, process_index=process_index, num_processes=num_processes
        )

    def batch(self, step: int) -> Tensor:
        """[B, D] float32 rows of one step."""
        rows = np.concatenate([examples for _, examples in self._epochs.examples(step)])
        return torch.from_numpy(np.asarray(self._features[rows], dtype=np.float32))


class TrainingBatches:
    """Jagged training batches: shuffled epochs over the examples of a split's training ranges.

    Args:
        histories: where the items are; batches are built on their device.
        ranges: the training role of a split.
        strategy: how ranges become examples.
        max_history: items kept in front of a target.
        batch_size: examples per process and step.
        seed: fixes order and windows.
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
        self._gather = JaggedGather(histories)
        self._device = histories.item_ids.device
        self._example_ends = np.cumsum(self._ends - self._begins)
        self.num_examples = int(self._example_ends[-1]) if strategy is ExampleStrategy.EVERY_PREFIX else len(self._rows)
        self._epochs = ShuffledEpochs(
            self.num_examples, batch_size, seed, process_index=process_index, num_processes=num_processes
        )
        self._epoch_windows = lru_cache(maxsize=2)(self._draw_epoch_windows)

    def batch(self, step: int) -> SeqBatch:
        """The batch of one step; the same arguments always give the same batch."""
        parts = [self._ranges_of(epoch, examples) for epoch, examples in self._epochs.examples(step)]
        rows, begins, ends = (
            torch.from_numpy(np.concatenate(columns)).to(self._device) for columns in zip(*parts, strict=True)
        )
        return self._gather(rows, begins, ends, self._max_history)

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
    for start in range(0, len(ranges), batch_size):
        part = slice(start, start + batch_size)
        yield gather(ranges.rows[part].long(), ranges.begins[part], ranges.ends[part], max_history)


def cold_items(histories: Histories, split: Split, num_items: int) -> Tensor:
    """[N] bool, true for items that no training range of the split contains."""
    cold = torch.ones(num_items, dtype=torch.bool)
    cold[histories.item_ids[split.train.visible(histories)].long()] = False
    return cold
