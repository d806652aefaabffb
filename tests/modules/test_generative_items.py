"""Generation with a model that reads item features."""

from dataclasses import replace

import pytest
import torch

import ops.graphs
from data.schemas import SeqBatch
from modules.generation.exact import ExactRanker
from modules.generation.ranker import GenerativeRanker
from modules.tokenizer.sequence import SequenceTokenizer
from tests.modules.tiny_liger import HISTORIES, NUM_FEATURES, ROWS, liger_model, liger_parts, tokenizer_of
from tests.ops.recorders import TapeRecorder

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def brute_force(model, tokenizer, items):
    """[B, N] log-likelihoods: every item as the target of every history."""
    model.eval()
    vectors, num_items = model.project_items(items), len(items)
    tokenize = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary)
    scores = []
    for row in ROWS:
        histories = replace(SeqBatch.from_lists([row] * num_items), targets=torch.arange(num_items))
        scores.append(model.log_likelihood(tokenize(histories), vectors))
    return torch.stack(scores)


@pytest.mark.parametrize("kind", [GenerativeRanker, ExactRanker])
def test_wide_beams_and_exact_scores_equal_brute_force(kind):
    model, tokenizer, items = liger_parts()
    item_ids, scores = kind(model, tokenizer, items, batch_size=3).rank(HISTORIES, 40)
    assert item_ids.sort().values.tolist() == [list(range(40))] * 4
    torch.testing.assert_close(scores, brute_force(model, tokenizer, items).gather(1, item_ids), **CLOSE)


def test_features_decide():
    model, tokenizer, items = liger_parts()
    other = replace(items, features=items.features.neg())
    one, two = (GenerativeRanker(model, tokenizer, table).rank(HISTORIES, 40)[1] for table in (items, other))
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.fixture
def tape(monkeypatch):
    """Searches are filled up and recorded as on a GPU, by ops that could run there."""
    tape = TapeRecorder()
    monkeypatch.setattr(ops.graphs, "recorder_for", lambda device: tape)
    monkeypatch.setattr("ops.checks._reads_values", lambda tensor: False)
    for room in ("attention", "codes", "layers"):
        monkeypatch.setattr(f"ops.{room}.uses_cpu_path", lambda device_type, seed: False)
    return tape


def test_recordings_read_the_item_vectors_of_the_moment(tape):
    model, tokenizer, items = liger_parts()
    ranker = GenerativeRanker(model, tokenizer, items)
    for _ in range(3):
        before = ranker.rank(HISTORIES, 40)
    model.load_state_dict(liger_model(seed=3).state_dict())
    after = ranker.rank(HISTORIES, 40)
    assert tape.log.count("record") == 1
    assert tape.log[-1] == "replay"
    fresh = GenerativeRanker(model, tokenizer, items, cuda_graphs=False).rank(HISTORIES, 40)
    torch.testing.assert_close(after[1], fresh[1], **CLOSE)
    assert not torch.allclose(before[1], after[1], **CLOSE)


@pytest.mark.parametrize("by_other", [False, True])
def test_recordings_begin_anew_when_the_catalogue_has_changed(tape, by_other):
    """Also when another ranker that shares the projections has taken over the change."""
    model, tokenizer, items = liger_parts()
    ranker = GenerativeRanker(model, tokenizer, items)
    for _ in range(3):
        ranker.rank(HISTORIES, 40)
    if by_other:
        changed = items.with_rows(torch.tensor([0, 3, 4]), torch.randn(3, NUM_FEATURES) * 3)
        ranker.projected.refresh(changed)
    else:
        tokenizer = tokenizer_of(41)
        changed = items.with_rows(torch.tensor([0, 40]), torch.randn(2, NUM_FEATURES) * 3)
        ranker.refresh(tokenizer, changed)
    fresh = GenerativeRanker(model, tokenizer, changed, cuda_graphs=False).rank(HISTORIES, 41)
    for _ in range(3):
        torch.testing.assert_close(ranker.rank(HISTORIES, 41)[1], fresh[1], **CLOSE)
    assert tape.log.count("record") == 2
