"""Settings of the training scripts that no run could use, refused before anything is read."""

from typing import Any

import pytest

import train_decoder
import train_rqvae
from data.schemas import InputError
from training.run_folder import RunOptions


def settings(**changes: Any) -> dict[str, Any]:
    given = dict.fromkeys(("dataset", "features", "model", "loop"))
    return {**given, "options": RunOptions(), "save_dir_root": "nowhere", **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "train_rqvae.train.batch_size expected at least 1, got 0"),
        ({"kmeans_rows": -5}, "train_rqvae.train.kmeans_rows expected at least 1, got -5"),
        ({"pretrain_steps": -1}, "train_rqvae.train.pretrain_steps expected at least 0, got -1"),
        (
            {"temperature": (0.0, 0.02)},
            r"train_rqvae.train.temperature expected two positive numbers, got \(0.0, 0.02\)",
        ),
        ({"min_codebook_use": 2.0}, r"train_rqvae.train.min_codebook_use expected a share in \(0, 1\], got 2.0"),
        ({"held_out": 1.0}, r"train_rqvae.train.held_out expected a share in \[0, 1\), got 1.0"),
        ({"neighbours_together": 0}, "train_rqvae.train.neighbours_together expected at least 1, got 0"),
        ({"train_on": "Seen"}, "train_rqvae.train.train_on expected one of all, seen, got 'Seen'"),
        (
            {"select_by": "use"},
            "train_rqvae.train.select_by expected one of reconstruction, loss, collisions, got 'use'",
        ),
    ],
)
def test_rqvae_settings(change, message):
    with pytest.raises(InputError, match=message):
        train_rqvae.train(**settings(**change))


@pytest.mark.parametrize("name", ["batch_size", "max_history", "beam_width", "max_valid_users"])
def test_decoder_settings(name):
    with pytest.raises(InputError, match=rf"train_decoder.train.{name} expected at least 1, got 0"):
        train_decoder.train(**settings(**{name: 0}))
