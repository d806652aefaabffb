import pytest
import torch

from data.schemas import InputError
from modules.tokenizer.vocabulary import CodeVocabulary


def test_tokens_are_numbered_in_the_documented_order() -> None:
    vocabulary = CodeVocabulary({"text": (4, 3), "image": (2,)}, num_user_buckets=5, separator=True)
    assert (vocabulary.bos, vocabulary.separator_token) == (0, 1)
    assert vocabulary.level_offsets("text") == (2, 6)
    assert vocabulary.offset("image", 0) == 9
    assert (vocabulary.num_levels("text"), vocabulary.size("text", 1)) == (2, 3)
    assert vocabulary.user_tokens(torch.tensor([0, 4, 5])).tolist() == [11, 12, 13]
    assert vocabulary.num_tokens == 16


def test_without_separator_and_users() -> None:
    vocabulary = CodeVocabulary({"text": (4, 3)})
    assert vocabulary.separator_token is None
    assert vocabulary.level_offsets("text") == (1, 5)
    assert vocabulary.num_tokens == 8
    with pytest.raises(InputError, match="no user tokens"):
        vocabulary.user_tokens(torch.tensor([1]))


def test_negative_hashes_stay_inside_the_buckets() -> None:
    vocabulary = CodeVocabulary({"text": (4,)}, num_user_buckets=3)
    tokens = vocabulary.user_tokens(torch.tensor([-1, -(1 << 63), (1 << 63) - 1]))
    assert tokens.min() >= 5
    assert tokens.max() < vocabulary.num_tokens


@pytest.mark.parametrize(
    ("languages", "buckets", "message"),
    [
        ({}, 0, "at least one language"),
        ({"text": ()}, 0, "level sizes"),
        ({"text": (4, 0)}, 0, r"got \(4, 0\)"),
        ({"text": (4,)}, -1, "got -1"),
    ],
)
def test_wrong_sizes_are_refused(languages: dict, buckets: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CodeVocabulary(languages, num_user_buckets=buckets)


def test_unknown_language_lists_the_valid_ones() -> None:
    with pytest.raises(InputError, match="unknown code language 'img'; valid languages: text, image"):
        CodeVocabulary({"text": (4,), "image": (4,)}).offset("img", 0)


def test_unknown_users_share_a_token_with_nobody() -> None:
    hashes = torch.tensor([0, 6, -6, 12, 1 << 40])
    tokens = CodeVocabulary({"text": (4,)}, num_user_buckets=7).user_tokens(hashes)
    assert tokens[0] == 5
    assert (tokens[1:] > 5).all()
    assert CodeVocabulary({"text": (4,)}, num_user_buckets=1).user_tokens(hashes).tolist() == [5] * 5
