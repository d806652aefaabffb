"""A tiny deterministic model with the interface that generation needs, and brute-force scoring with any such model."""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn

from data.schemas import TokenizedSeqBatch


@dataclass(eq=False)
class PrefixState:
    """Sums of the codes so far, [B, W, width], and how many there are."""

    level: int
    prefix: torch.Tensor

    def fork(self):
        return replace(self)


class PrefixModel(nn.Module):
    """Logits are a random linear function of the mean history token and the codes so far.

    Attributes:
        calls: shapes of the codes given to `step`.
    """

    def __init__(self, level_sizes, num_tokens=50, width=8, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator), requires_grad=False)

        self.tokens = random(num_tokens, width)
        self.code_tables = nn.ParameterList([random(size, width) for size in level_sizes])
        self.heads = nn.ParameterList([random(width, size) for size in level_sizes])
        self.calls = []

    def _read(self, batch):
        lengths = batch.offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(len(batch)), lengths)
        sums = torch.zeros(len(batch), self.tokens.shape[1]).index_add_(0, rows, self.tokens[batch.tokens])
        return sums / lengths.clamp(min=1)[:, None]

    def start(self, batch):
        return PrefixState(0, self._read(batch)[:, None])

    def step(self, state, codes, parents):
        if codes is not None:
            self.calls.append(tuple(codes.shape))
            parent_prefix = state.prefix.gather(1, parents[:, :, None].expand(-1, -1, state.prefix.shape[2]))
            state.prefix = parent_prefix + self.code_tables[state.level - 1][codes]
        logits = torch.tanh(state.prefix) @ self.heads[state.level]
        state.level += 1
        return logits

    def log_likelihood(self, batch):
        state = self.start(batch)
        total = torch.zeros(len(batch))
        parents = torch.zeros(len(batch), 1, dtype=torch.int64)
        for level in range(len(self.heads)):
            codes = batch.target_codes[:, level - 1 : level] if level else None
            logits = self.step(state, codes, parents if level else None)[:, 0]
            total += logits.log_softmax(-1).gather(1, batch.target_codes[:, level : level + 1]).squeeze(1)
        return total


def tokenized(rows):
    """A TokenizedSeqBatch from lists of tokens."""
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return TokenizedSeqBatch(tokens, offsets, max((len(row) for row in rows), default=0))


def all_log_likelihoods(model, batch, semantic_ids):
    """[B, N] log-likelihood of every item after every row, one row at a time through `log_likelihood`."""
    bounds = batch.offsets.tolist()
    rows = []
    for begin, end in itertools.pairwise(bounds):
        tokens = batch.tokens[begin:end].repeat(len(semantic_ids))
        offsets = torch.arange(len(semantic_ids) + 1, dtype=torch.int32) * (end - begin)
        repeated = TokenizedSeqBatch(tokens, offsets, end - begin, target_codes=semantic_ids)
        with torch.no_grad():
            rows.append(model.log_likelihood(repeated))
    return torch.stack(rows)


def random_semantic_ids(num_items, level_sizes, seed=0):
    """[N, L] distinct code tuples in random order; fewer rows where the levels do not allow as many."""
    generator = torch.Generator().manual_seed(seed)
    capacity = 1
    for size in level_sizes:
        capacity *= size
    numbers = torch.randperm(capacity, generator=generator)[:num_items]
    columns = []
    for size in reversed(level_sizes):
        columns.append(numbers % size)
        numbers = numbers // size
    return torch.stack(columns[::-1], 1)
