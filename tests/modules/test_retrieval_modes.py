import pytest
import torch

from data.schemas import InputError
from modules.dense.hybrid import HybridRanker
from modules.dense.ranker import DenseRanker
from modules.generation.ranker import GenerativeRanker
from modules.retrieval_modes import make_ranker, make_rankers, ranker_name
from tests.modules.tiny_liger import HISTORIES, liger_model, liger_parts


@pytest.mark.parametrize(
    ("mode", "name", "kind"),
    [
        ("generative", "generative", GenerativeRanker),
        ("dense", "dense", DenseRanker),
        ("hybrid", "hybrid@20", HybridRanker),
        ("hybrid@3", "hybrid@3", HybridRanker),
        ("hybrid@all", "hybrid@all", DenseRanker),
    ],
)
def test_modes(mode, name, kind):
    model, tokenizer, items = liger_parts()
    ranker = make_ranker(model, tokenizer, items, mode=mode, max_history=3, batch_size=2)
    assert (type(ranker), ranker.name, ranker_name(mode)) == (kind, name, name)
    assert (ranker.max_history, ranker.batch_size) == (3, 2)


def test_rankers_of_all_modes_share_what_they_keep():
    model, tokenizer, items = liger_parts()
    modes = ["hybrid@4", "generative", "dense", "hybrid@all"]
    rankers = make_rankers(model, tokenizer, items, modes=modes, beam_width=7, normalize="children")
    assert [ranker.name for ranker in rankers] == modes
    hybrid, generative, dense, everything = rankers
    assert (generative.beam_width, generative._normalize) == (7, "children")
    assert hybrid._generative is generative
    assert dense._projected is everything._projected is hybrid._projected is generative.projected
    for one, other in zip(dense.rank(HISTORIES, 9), everything.rank(HISTORIES, 9), strict=True):
        assert torch.equal(one, other)
    for ranker, mode in zip(rankers, modes, strict=True):
        alone = make_ranker(model, tokenizer, items, mode=mode, beam_width=7, normalize="children")
        for one, other in zip(ranker.rank(HISTORIES, 9), alone.rank(HISTORIES, 9), strict=True):
            assert torch.equal(one, other)


def test_dense_rankers_need_no_decoder():
    _, tokenizer, items = liger_parts()
    model = liger_model(sid_loss_weight=0.0)
    names = [ranker.name for ranker in make_rankers(model, tokenizer, items, modes=["dense", "hybrid@all"])]
    assert names == ["dense", "hybrid@all"]
    for mode in ("generative", "hybrid"):
        with pytest.raises(InputError, match="need a model with a decoder"):
            make_ranker(model, tokenizer, items, mode=mode)


def test_models_without_item_features_have_one_mode():
    _, tokenizer, _ = liger_parts()
    tiger = liger_model(items=None, embedding_loss_weight=0.0)
    assert make_ranker(tiger, tokenizer).name == "generative"
    for mode in ("dense", "hybrid@5", "hybrid@all"):
        with pytest.raises(InputError, match=f"{mode} retrieval needs a model with a dense head"):
            make_ranker(tiger, tokenizer, mode=mode)


@pytest.mark.parametrize("mode", ["beam", "hybrid@", "hybrid@0", "hybrid@-1", "hybrid@20x", "Dense", ""])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(InputError, match=rf"unknown retrieval mode '{mode}'; valid modes: generative, dense, hybrid"):
        ranker_name(mode)


def test_more_beams_than_there_are_and_modes_named_twice_are_refused():
    parts = liger_parts()
    with pytest.raises(InputError, match=r"first 40 of only 20 beams\. Give --beam-width 40"):
        make_ranker(*parts, mode="hybrid@40")
    with pytest.raises(InputError, match="every retrieval mode once, got hybrid@20 2 times"):
        make_rankers(*parts, modes=["hybrid", "dense", "hybrid@20"])
