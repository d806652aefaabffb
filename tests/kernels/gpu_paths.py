"""Ways through the model that it takes on a GPU alone, for tests that have none."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from modules.code_heads import CodeHeads
from modules.transformer.decoder import Decoder


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block models join products to save launches, on a CPU too."""
    cross_kv = Decoder._cross_kv

    def in_one_product(decoder, encoded, *, one_product):
        return cross_kv(decoder, encoded, one_product=True)

    with (
        mock.patch.object(Decoder, "_cross_kv", in_one_product),
        mock.patch.object(CodeHeads, "_level_by_level", CodeHeads._in_one_product),
    ):
        yield
