"""The one numbering of everything that the retrieval model reads: BOS, separator, codes of every language, users."""

import torch
from torch import Tensor

from data.schemas import InputError


class CodeVocabulary:
    """Maps (language, level, code) and users to tokens.

    Order of tokens: BOS, the separator if there is one, each language's levels in turn, user buckets.

    Args:
        languages: codebook sizes of each language's levels, the dedup level included.
        num_user_buckets: user tokens, 0 for none; the first is for unknown users, hashes share the others.
        separator: whether a token ends every item.

    Raises:
        InputError: without languages, with a language without levels, or with a size below 1.
    """

    bos = 0

    def __init__(
        self, languages: dict[str, tuple[int, ...]], *, num_user_buckets: int = 0, separator: bool = False
    ) -> None:
        if not languages:
            raise InputError("CodeVocabulary expected at least one language, got none. Name one, such as 'text'.")
        for language, sizes in languages.items():
            if not sizes or min(sizes) < 1:
                raise InputError(f"CodeVocabulary expected level sizes of at least 1 in {language!r}, got {sizes}.")
        if num_user_buckets < 0:
            raise InputError(f"CodeVocabulary expected num_user_buckets of at least 0, got {num_user_buckets}.")
        self.languages = {language: tuple(sizes) for language, sizes in languages.items()}
        self.num_user_buckets = num_user_buckets
        self.separator_token = 1 if separator else None
        self._offsets: dict[str, tuple[int, ...]] = {}
        next_token = 2 if separator else 1
        for language, sizes in self.languages.items():
            self._offsets[language] = tuple(next_token + sum(sizes[:level]) for level in range(len(sizes)))
            next_token += sum(sizes)
        self._first_user_token = next_token
        self.num_tokens = next_token + num_user_buckets

    def _sizes(self, language: str) -> tuple[int, ...]:
        if language not in self.languages:
            raise InputError(f"unknown code language {language!r}; valid languages: {', '.join(self.languages)}.")
        return self.languages[language]

    def num_levels(self, language: str) -> int:
        """Codes per item in a language."""
        return len(self._sizes(language))

    def size(self, language: str, level: int) -> int:
        """Codes of one level."""
        return self._sizes(language)[level]

    def offset(self, language: str, level: int) -> int:
        """Token of code 0 of one level."""
        self._sizes(language)
        return self._offsets[language][level]

    def level_offsets(self, language: str) -> tuple[int, ...]:
        """Token of code 0 of every level."""
        self._sizes(language)
        return self._offsets[language]

    def user_tokens(self, user_hashes: Tensor) -> Tensor:
        """[B] int64 hashes -> [B] int64 tokens; the same hash always gets the same token, hash 0 that of unknown users.

        Raises:
            InputError: if the vocabulary has no user buckets.
        """
        if self.num_user_buckets == 0:
            raise InputError("the vocabulary has no user tokens. Set num_user_buckets above 0.")
        known = 1 + user_hashes.remainder(max(self.num_user_buckets - 1, 1))
        buckets = torch.where(user_hashes == 0, 0, known).clamp(max=self.num_user_buckets - 1)
        return buckets + self._first_user_token
