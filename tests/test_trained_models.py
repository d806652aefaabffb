"""The tokenizers that are shipped: whole, small, healthy, and without third-party texts."""

import json
import re
from pathlib import Path

import pytest

from evaluation.codebook import codebook_health
from modules.tokenizer.tokenizer import SemanticIdTokenizer

TRAINED_MODELS = Path(__file__).resolve().parent.parent / "trained_models"
FOLDERS = sorted(path.parent for path in TRAINED_MODELS.glob("*/manifest.json"))
MAX_BYTES = 5_000_000


def test_the_four_are_there():
    assert {folder.name for folder in FOLDERS} == {"beauty", "demo", "ml-latest-small", "sports"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_whole_small_and_without_texts(folder):
    tokenizer = SemanticIdTokenizer.from_pretrained(folder)  # verifies hashes
    assert not any(tokenizer.catalogue.titles)
    assert not any(tokenizer.catalogue.categories)
    assert all(tokenizer.catalogue.item_keys)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MAX_BYTES
    assert tokenizer.semantic_ids.unique(dim=0).shape[0] == tokenizer.num_items


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_made_it_and_what_came_out_lie_beside_it(folder):
    tokenizer = SemanticIdTokenizer.from_pretrained(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    health = codebook_health(tokenizer.nearest_codes, tokenizer.codebook_sizes)
    for name, value in health.as_metrics().items():
        assert metrics[name] == pytest.approx(value), name
    assert "train_rqvae.train" in (folder / "config.gin").read_text()
    assert "trained by `python train_rqvae.py configs/" in (folder / "README.md").read_text()
    for path in folder.glob("*.*"):
        if path.suffix in (".md", ".gin", ".json"):
            assert not re.search(r"[\s'\"=](/[\w.-]+){2,}", path.read_text()), path.name
