import torch

from modules.embedding.token_embedding import TokenEmbedding
from modules.tokenizer.vocabulary import CodeVocabulary

VOCABULARY = CodeVocabulary({"text": (4, 3)}, num_user_buckets=2)


def test_tokens_and_codes_read_the_same_rows() -> None:
    embedding = TokenEmbedding(VOCABULARY, d_model=6)
    assert embedding.weight.shape == (10, 6)
    rows = embedding.codes(torch.tensor([[3, 2], [0, 0]]), "text")
    torch.testing.assert_close(rows, embedding(torch.tensor([[4, 7], [1, 5]])))


def test_codes_of_a_later_level() -> None:
    embedding = TokenEmbedding(VOCABULARY, d_model=6)
    rows = embedding.codes(torch.tensor([[1]]), "text", first_level=1)
    torch.testing.assert_close(rows[0, 0], embedding.weight[6])


def test_decoder_inputs_are_bos_and_all_codes_but_the_last() -> None:
    embedding = TokenEmbedding(VOCABULARY, d_model=6)
    rows = embedding.decoder_inputs(torch.tensor([[3, 2], [-1, -1]]), "text")
    torch.testing.assert_close(rows[0], embedding.weight[[0, 4]])
    torch.testing.assert_close(rows[1], torch.stack([embedding.weight[0], torch.zeros(6)]))


def test_buffers_are_not_saved() -> None:
    assert list(TokenEmbedding(VOCABULARY, d_model=6).state_dict()) == ["weight"]
