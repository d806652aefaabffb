"""Ways through the model that it takes on a GPU alone, for tests that have none."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from modules.model import EncoderDecoderRetrievalModel
from modules.transformer.decoder import Decoder


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block models join products to save launches, on a CPU too."""
    cross_kv = Decoder._cross_kv

    def in_one_product(decoder, encoded, *, one_product):
        return cross_kv(decoder, encoded, one_product=True)

    joined = EncoderDecoderRetrievalModel._losses_in_one_product
    with (
        mock.patch.object(Decoder, "_cross_kv", in_one_product),
        mock.patch.object(EncoderDecoderRetrievalModel, "_losses_level_by_level", joined),
    ):
        yield
