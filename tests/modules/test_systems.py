"""Artifacts of every kind of model, and what their rankers may be asked for."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from data.schemas import Histories, InputError, Ranges, SeqBatch
from modules.artifact import load_model_artifact, save_model_artifact
from modules.systems import SYSTEMS, system_of
from modules.tokenizer.artifact_folder import file_hashes
from tests.modules.tiny_artifact import (
    RANKER_SETTINGS,
    TINY_ITEMS,
    save_tiny_artifact,
    save_tiny_liger,
    save_tiny_sasrec,
    tiny_catalogue,
    tiny_items,
    tiny_model,
    tiny_tokenizer,
)

HISTORIES = SeqBatch.from_lists([[0, 3, 5, 1], [7], [2, 10]])
WITHOUT_TOKENIZER = ["sasrec", "hstu", "popularity", "random", "item_knn", "user_knn"]


def unfitted(name):
    """A random or counted model of 12 items."""
    system = system_of(name)
    config = system.config_class(num_items=12)
    torch.manual_seed(0)
    if not hasattr(system.model_class, "fit"):
        return system.model_class(replace(config, d_model=8)).eval()
    users = torch.arange(3)
    histories = Histories(torch.tensor([0, 4, 5, 7]).int(), HISTORIES.item_ids.int(), torch.arange(7), users)
    ranges = Ranges(users.int(), torch.zeros(3).int(), torch.tensor([3, 0, 1]).int())
    return system.model_class.fit(histories, ranges, 12, config)


def ranked(artifact, k=12, **overrides):
    return artifact.make_ranker(**overrides).rank(HISTORIES, k)


def assert_same_lists(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITHOUT_TOKENIZER)
def test_models_without_semantic_ids_are_artifacts(tmp_path, name):
    model, extra = unfitted(name), {"dataset": {"dataset": "demo"}, "commit": "c0"}
    settings = {"max_history": 3}
    save_model_artifact(tmp_path / "model", model, tiny_catalogue(), extra, ranker_settings=settings, system=name)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "catalogue.safetensors",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    loaded = load_model_artifact(tmp_path / "model")
    assert (loaded.system, loaded.tokenizer, loaded.items, loaded.available) == (name, None, None, None)
    assert (loaded.catalogue.item_keys, loaded.catalogue_version) == (tiny_catalogue().item_keys, 1)
    assert {key: loaded.manifest[key] for key in extra} == extra
    assert "tokenizer_hash" not in loaded.manifest
    ranker = loaded.make_ranker(batch_size=2)
    assert (ranker.name, ranker.max_history, ranker.batch_size) == (name, 3, 2)
    before = replace(loaded, model=model)
    assert_same_lists(ranked(loaded), ranked(before))
    assert ranked(loaded)[0].max() > 2
    loaded.save(tmp_path / "again")
    assert_same_lists(ranked(load_model_artifact(tmp_path / "again")), ranked(before))


def test_every_system_is_tested():
    assert sorted([*WITHOUT_TOKENIZER, "retrieval"]) == sorted(SYSTEMS)


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    return save_tiny_liger(tmp_path_factory.mktemp("liger") / "model")


def test_a_model_that_reads_items_keeps_them(liger):
    items = tiny_items()
    for column in ("features", "missing", "cold"):
        assert torch.equal(getattr(liger.items, column), getattr(items, column))
    assert sorted(liger.manifest["files"]) == ["config.json", "items.safetensors", "model.safetensors"]


def test_rankers_of_several_modes_stand_side_by_side(liger):
    modes = ["generative", "dense", "hybrid@3", "hybrid@all"]
    rankers = liger.make_rankers(modes, beam_width=9)
    assert [ranker.name for ranker in rankers] == modes
    assert [getattr(ranker, "beam_width", None) for ranker in rankers] == [9, None, 9, None]
    dense, of_all = rankers[1].rank(HISTORIES, 12), rankers[3].rank(HISTORIES, 12)
    assert_same_lists(of_all, dense)
    hybrid = rankers[2].rank(HISTORIES, 12)[0]
    assert ((hybrid != -1).sum(dim=1) >= 3).all()  # the three cold items, and beams that are not among them
    assert ((hybrid != -1).sum(dim=1) <= 6).all()
    assert (hybrid[:, :, None] == torch.tensor([9, 10, 11])).any(dim=1).all()
    assert liger.make_ranker().name == "generative"


def test_an_artifact_may_have_a_mode_of_its_own(tmp_path):
    artifact = save_tiny_liger(tmp_path / "model", settings=RANKER_SETTINGS | {"mode": "hybrid@4"})
    assert artifact.make_ranker().name == "hybrid@4"
    assert artifact.make_ranker(mode="dense").name == "dense"
    assert artifact.ranker_settings == {"beam_width": 5, "max_history": 4, "mode": "hybrid@4"}


def test_a_model_without_decoder_is_dense_by_itself(tmp_path):
    artifact = save_tiny_liger(tmp_path / "model", sid_loss_weight=0.0)
    assert artifact.make_ranker().name == "dense"
    for mode in ("generative", "hybrid"):
        with pytest.raises(InputError, match="need a model with a decoder"):
            artifact.make_ranker(mode=mode)


def test_what_a_model_cannot_is_refused(liger, tmp_path):
    tiger, sasrec = save_tiny_artifact(tmp_path / "tiger"), save_tiny_sasrec(tmp_path / "sasrec")
    for artifact, asked, message in (
        (tiger, {"mode": "dense"}, "dense retrieval needs a model with a dense head"),
        (tiger, {"mode": "hybrid@3"}, "needs a model with a dense head"),
        (tiger, {"mode": "sparse"}, "unknown retrieval mode 'sparse'; valid modes: generative, dense, hybrid"),
        (liger, {"mode": "hybrid@6"}, "first 6 of only 5 beams. Give --beam-width 6"),
        (liger, {"mode": "dense", "beam_width": 6}, "dense searches no beams, got beam_width 6"),
        (sasrec, {"mode": "generative"}, "a 'sasrec' model ranks in one way and has no retrieval modes, got mode 'gen"),
        (sasrec, {"beam_width": 7}, r"no beam_width; its settings: max_history, batch_size. Leave .*--beam-width"),
    ):
        with pytest.raises(InputError, match=message):
            artifact.make_ranker(**asked)


def test_items_that_are_damaged_or_missing_are_named(liger, tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        change(folder / "items.safetensors", folder / "manifest.json")
        with pytest.raises(InputError) as caught:
            load_model_artifact(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def forgotten(items, manifest):
        content = json.loads(manifest.read_text())
        del content["files"]["items.safetensors"]
        manifest.write_text(json.dumps(content))
        items.unlink()

    def replaced(table):
        def change(items, manifest):
            table.save(items)
            content = json.loads(manifest.read_text())
            content["files"] = file_hashes(items.parent, content["files"])
            manifest.write_text(json.dumps(content))

        return change

    saved = tmp_path / "model"
    liger.save(saved)
    narrow = replace(liger.items, features=liger.items.features[:, :5].contiguous())
    whole = (saved / "items.safetensors").read_bytes()
    assert "items.safetensors is damaged" in broken("cut", lambda items, _: items.write_bytes(whole[:-40]))
    assert "items.safetensors is missing" in broken("lost", lambda items, _: items.unlink())
    assert "no hash of items.safetensors" in broken("forgotten", forgotten)
    assert "features of shape [12, 6]" in (text := broken("short", replaced(tiny_items(11))))
    assert "got [11, 6]" in text
    assert "got [12, 5]" in broken("narrow", replaced(narrow))
    table = tiny_items()
    numbers = {"features": table.features, "missing": table.missing.float(), "cold": table.cold}
    other = SimpleNamespace(save=lambda path: save_file(numbers, path))
    assert "items.safetensors: ItemTable.missing expected 12 rows of torch.bool" in broken("other", replaced(other))


def test_a_catalogue_that_is_damaged_missing_or_of_others_is_named(tmp_path):
    save_tiny_sasrec(tmp_path / "model")
    catalogue, manifest = tmp_path / "model" / "catalogue.safetensors", tmp_path / "model" / "manifest.json"
    whole = catalogue.read_bytes()
    catalogue.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"catalogue\.safetensors is damaged"):
        load_model_artifact(tmp_path / "model")
    catalogue.unlink()
    with pytest.raises(InputError, match=r"catalogue\.safetensors is missing"):
        load_model_artifact(tmp_path / "model")
    tiny_catalogue(13).save(catalogue)
    content = json.loads(manifest.read_text())
    content["files"] = file_hashes(catalogue.parent, content["files"])
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the model is of 12 items, the catalogue has 13"):
        load_model_artifact(tmp_path / "model")


def test_parts_that_do_not_belong_together_are_not_saved(liger, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.level_sizes, items=TINY_ITEMS, embedding_loss_weight=1.0)
    plain = tiny_model(tokenizer.level_sizes)
    for parts, items, message in (
        ((model, tokenizer), None, r"expected item features of shape \[12, 6\].* got None"),
        ((plain, tokenizer), tiny_items(), r"expected item features of shape None.* got \[12, 6\]"),
        ((model, tokenizer), tiny_items(13), r"got \[13, 6\]"),
        ((plain, tiny_catalogue()), None, "a 'retrieval' model needs a tokenizer, got no tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            save_model_artifact(tmp_path / "model", *parts, {}, ranker_settings={}, items=items)
    assert list(tmp_path.iterdir()) == []


def test_a_catalogue_changes_with_its_items(liger, tmp_path):
    grown = liger.tokenizer.with_items(["new"], torch.ones(1, 6))
    with pytest.raises(InputError, match=r"features of shape \[13, 6\].* got \[12, 6\]"):
        liger.with_catalogue(grown, liger.items)
    items = liger.items.with_rows(torch.tensor([12]), torch.ones(1, 6))
    liger.with_catalogue(grown, items).save(tmp_path / "grown")
    loaded = load_model_artifact(tmp_path / "grown")
    assert (len(loaded.catalogue), loaded.catalogue_version) == (13, 2)
    assert torch.equal(loaded.items.features, items.features)
    assert loaded.items.missing.tolist() == [item == 1 for item in range(13)]
    assert loaded.items.cold.tolist() == [item >= 9 for item in range(13)]


def test_artifacts_from_before_there_were_items_load_as_ever(tmp_path):
    """Their config names neither items nor loss weights."""
    artifact = save_tiny_artifact(tmp_path / "model")
    path, manifest = tmp_path / "model" / "config.json", tmp_path / "model" / "manifest.json"
    config = json.loads(path.read_text())
    for name in ("items", "sid_loss_weight", "embedding_loss_weight"):
        del config["model"][name]
    path.write_text(json.dumps(config))
    content = json.loads(manifest.read_text())
    content["files"] = file_hashes(path.parent, content["files"])
    manifest.write_text(json.dumps(content))
    older = load_model_artifact(tmp_path / "model")
    assert older.model.config == artifact.model.config
    assert_same_lists(ranked(older), ranked(artifact))
