from dataclasses import replace

import pytest
import torch

from data.schemas import NO_TARGET, InputError, SeqBatch
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.vocabulary import CodeVocabulary

SEMANTIC_IDS = torch.tensor([[0, 0], [1, 2], [3, 1]])


def batch_of(*histories: list[int]) -> SeqBatch:
    return replace(SeqBatch.from_lists(list(histories)), user_hashes=torch.arange(len(histories)) + 7)


def test_codes_alone() -> None:
    tokenized = SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (4, 3)}))(batch_of([2, 1], [], [0]))
    assert tokenized.tokens.tolist() == [4, 6, 2, 7, 1, 5]
    assert tokenized.offsets.tolist() == [0, 4, 4, 6]
    assert tokenized.offsets.dtype == torch.int32
    assert tokenized.max_len == 4
    assert tokenized.target_codes is None


def test_user_token_and_separator() -> None:
    vocabulary = CodeVocabulary({"text": (4, 3)}, num_user_buckets=10, separator=True)
    tokenized = SequenceTokenizer(SEMANTIC_IDS, vocabulary)(batch_of([2, 1], [], [0]))
    # Tokens: BOS 0, separator 1, level 0 from 2, level 1 from 6, users from 9; hashes are 7, 8, 9.
    assert tokenized.tokens.tolist() == [17, 5, 7, 1, 3, 8, 1, 18, 10, 2, 6, 1]
    assert tokenized.offsets.tolist() == [0, 7, 8, 12]
    assert tokenized.offsets.dtype == torch.int32
    assert tokenized.max_len == 7


def test_targets_are_codes_without_offsets() -> None:
    batch = replace(batch_of([0], [1]), targets=torch.tensor([2, 1]))
    tokenized = SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (4, 3)}))(batch)
    assert tokenized.target_codes is not None
    assert tokenized.target_codes.tolist() == [[3, 1], [1, 2]]


def test_rows_without_target_have_no_codes_and_unknown_items_are_refused() -> None:
    tokenize = SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (4, 3)}))
    batch = replace(batch_of([0], [1]), targets=torch.tensor([NO_TARGET, 0]))
    target_codes = tokenize(batch).target_codes
    assert target_codes is not None
    assert target_codes.tolist() == [[NO_TARGET, NO_TARGET], [0, 0]]
    for unknown in (len(SEMANTIC_IDS), len(SEMANTIC_IDS) + 5):
        with pytest.raises(IndexError):
            tokenize(replace(batch, targets=torch.tensor([0, unknown])))
        with pytest.raises(IndexError):
            tokenize(batch_of([unknown]))


@pytest.mark.parametrize("buckets", [0, 10])
def test_only_empty_rows(buckets: int) -> None:
    vocabulary = CodeVocabulary({"text": (4, 3)}, num_user_buckets=buckets)
    tokenized = SequenceTokenizer(SEMANTIC_IDS, vocabulary)(batch_of([], []))
    assert len(tokenized.tokens) == (2 if buckets else 0)
    assert tokenized.offsets.tolist() == ([0, 1, 2] if buckets else [0, 0, 0])


def test_equals_a_loop_over_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    semantic_ids = torch.randint(5, (30, 3), generator=generator)
    vocabulary = CodeVocabulary({"text": (5, 5, 5)}, num_user_buckets=4, separator=True)
    lengths = [0, 1, 63, 0, 7, 20]
    histories = [torch.randint(30, (length,), generator=generator).tolist() for length in lengths]
    batch = batch_of(*histories)
    expected = []
    for history, user_hash in zip(histories, batch.user_hashes.tolist(), strict=True):
        expected.append(2 + 15 + 1 + user_hash % 3)
        for item in history:
            expected += [2 + 5 * level + code for level, code in enumerate(semantic_ids[item].tolist())] + [1]
    assert SequenceTokenizer(semantic_ids, vocabulary)(batch).tokens.tolist() == expected


@pytest.mark.parametrize("buckets", [0, 10])
def test_a_batch_of_fixed_capacity(buckets: int) -> None:
    vocabulary = CodeVocabulary({"text": (4, 3)}, num_user_buckets=buckets)
    tokenize = SequenceTokenizer(SEMANTIC_IDS, vocabulary)
    batch = replace(batch_of([2, 1], [0]), targets=torch.tensor([1, 2]))
    plain, filled = tokenize(batch), tokenize(batch.to_capacity(num_rows=4, num_items=5))
    # Empty rows hold their user token alone, that of unknown users: behind BOS 0, level 0 from 1 and level 1 from 5.
    users = [8] * 2 if buckets else []
    num_tokens = len(plain.tokens) + len(users)
    assert filled.tokens[:num_tokens].tolist() == plain.tokens.tolist() + users
    assert len(filled.tokens) == num_tokens + 2 * 2
    assert filled.offsets.tolist() == plain.offsets.tolist() + ([9, 10] if buckets else [6, 6])
    assert filled.max_len == plain.max_len
    assert filled.target_codes is not None
    assert filled.target_codes.tolist() == [[1, 2], [3, 1], [-1, -1], [-1, -1]]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected semantic ids \[N, 3\] .* got \[3, 2\]"):
        SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (4, 3, 2)}))
    with pytest.raises(InputError, match=r"codes 0..2 in level 0 of 'text', got 0..3"):
        SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (3, 3)}))


def test_the_batch_has_to_be_on_the_tokenizer_s_device() -> None:
    tokenize = SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (4, 3)}, num_user_buckets=2)).to("meta")
    assert {buffer.device.type for buffer in tokenize.buffers()} == {"meta"}
    assert tokenize(batch_of([1]).to("meta")).tokens.shape == (3,)


def test_ids_are_not_part_of_the_state() -> None:
    assert SequenceTokenizer(SEMANTIC_IDS, CodeVocabulary({"text": (4, 3)})).state_dict() == {}
