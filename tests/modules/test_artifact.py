import json
import shutil

import pytest
import torch

from data.schemas import InputError, SeqBatch
from modules.artifact import load_model_artifact, save_model_artifact
from tests.modules.tiny_artifact import RANKER_SETTINGS, save_tiny_artifact, tiny_model, tiny_tokenizer


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.level_sizes)
    origin = {"dataset": {"dataset": "demo", "seed": 3}, "dataset_manifest_hash": "d0", "commit": "c0"}
    save_model_artifact(tmp_path / "model", model, tokenizer, origin, ranker_settings=RANKER_SETTINGS)
    artifact = load_model_artifact(tmp_path / "model")
    assert artifact.model.config == model.config
    assert not artifact.model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(artifact.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert artifact.tokenizer.content_hash == tokenizer.content_hash
    assert artifact.manifest["tokenizer_hash"] == tokenizer.content_hash
    assert {name: artifact.manifest[name] for name in origin} == origin
    assert artifact.ranker_settings == {"beam_width": 5, "max_history": 4}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["system"], config["ranker"]) == ("retrieval", {"beam_width": 5, "max_history": 4})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer",
    ]


def test_loaded_model_ranks_as_the_saved_one(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.level_sizes)
    save_model_artifact(tmp_path / "model", model, tokenizer, {}, ranker_settings=RANKER_SETTINGS)
    artifact = load_model_artifact(tmp_path / "model")
    histories = SeqBatch.from_lists([[0, 3], [5]])
    ranker = artifact.make_ranker()
    assert (ranker.beam_width, ranker.max_history) == (5, 4)
    wide = artifact.make_ranker(beam_width=9, max_history=None)
    assert (wide.beam_width, wide.max_history) == (9, 4)
    artifact.model.load_state_dict(model.state_dict())
    for one, other in zip(ranker.rank(histories, 5), artifact.make_ranker().rank(histories, 5), strict=True):
        assert torch.equal(one, other)


def test_a_run_folder_stands_for_its_model(tmp_path):
    save_tiny_artifact(tmp_path / "model")
    assert load_model_artifact(str(tmp_path)).system == "retrieval"


def test_saving_again_replaces_the_older_artifact(tmp_path):
    old = save_tiny_artifact(tmp_path / "model", seed=0)
    new = save_tiny_artifact(tmp_path / "model", seed=1)
    assert new.tokenizer.content_hash != old.tokenizer.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_older_artifact(tmp_path, monkeypatch):
    save_tiny_artifact(tmp_path / "model")
    before = contents(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modules.tokenizer.tokenizer.SemanticIdTokenizer.save_pretrained", full_disk)
    with pytest.raises(InputError, match="the disk is full"):
        save_tiny_artifact(tmp_path / "model", seed=1)
    assert contents(tmp_path) == before


def test_a_full_disk_during_the_weights_is_one_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full_disk(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("modules.model_files.save_file", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_tiny_artifact(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a model"):
        save_tiny_artifact(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="holds no model artifact"):
        load_model_artifact(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        load_model_artifact(tmp_path / "absent" / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json", "tokenizer"])
def test_missing_parts_are_named(tmp_path, name):
    save_tiny_artifact(tmp_path / "model")
    part = tmp_path / "model" / name
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink()
    with pytest.raises(InputError, match=name):
        load_model_artifact(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer/semantic_ids/text.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    save_tiny_artifact(tmp_path / "model")
    path = tmp_path / "model" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        load_model_artifact(tmp_path / "model")


def test_truncated_weights(tmp_path):
    save_tiny_artifact(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load_model_artifact(tmp_path / "model")


def test_another_tokenizer_is_refused(tmp_path):
    save_tiny_artifact(tmp_path / "model")
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "model" / "tokenizer")
    with pytest.raises(InputError, match="not the tokenizer that this model was trained with: expected content hash"):
        load_model_artifact(tmp_path / "model")


def test_a_model_accepts_later_versions_of_its_catalogue(tmp_path):
    artifact = save_tiny_artifact(tmp_path / "model")
    grown = artifact.tokenizer.with_items(["new"], torch.zeros(1, 6)).without_items(["item-3"])
    grown.save_pretrained(tmp_path / "model" / "tokenizer")
    loaded = load_model_artifact(tmp_path / "model")
    assert loaded.tokenizer.content_hash == grown.content_hash
    assert loaded.manifest["tokenizer_hash"] == artifact.tokenizer.content_hash


def test_saving_keeps_the_hash_that_the_model_was_trained_with(tmp_path):
    artifact = save_tiny_artifact(tmp_path / "model")
    grown = artifact.with_catalogue(artifact.tokenizer.with_items(["new"], torch.zeros(1, 6)))
    grown.save(tmp_path / "model")
    loaded = load_model_artifact(tmp_path / "model")
    assert loaded.tokenizer.num_items == artifact.tokenizer.num_items + 1
    for name in ("tokenizer_hash", "dataset", "commit", "files"):
        assert loaded.manifest[name] == artifact.manifest[name]
    assert (loaded.system, loaded.ranker_settings) == (artifact.system, artifact.ranker_settings)
    assert set(loaded.make_ranker().rank(SeqBatch.from_lists([[0, 3]]), 13)[0][0].tolist()) == set(range(13))
    again = loaded.with_catalogue(loaded.tokenizer.with_items(["newer"], torch.ones(1, 6)))
    again.save(tmp_path / "other")
    assert load_model_artifact(tmp_path / "other").tokenizer.catalogue_version == 3


def test_unrelated_and_earlier_tokenizers_are_not_saved(tmp_path):
    artifact = save_tiny_artifact(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="to be saved is not the tokenizer that this model was trained with"):
        artifact.with_catalogue(tiny_tokenizer(seed=1)).save(tmp_path / "model")
    assert contents(tmp_path) == before
    grown = artifact.tokenizer.with_items(["new"], torch.zeros(1, 6))
    save_model_artifact(tmp_path / "grown", artifact.model, grown, {}, ranker_settings=RANKER_SETTINGS)
    artifact.tokenizer.save_pretrained(tmp_path / "grown" / "tokenizer")
    with pytest.raises(InputError, match="nor a later version of its catalogue"):
        load_model_artifact(tmp_path / "grown")


def test_newer_format(tmp_path):
    save_tiny_artifact(tmp_path / "model")
    change_json(tmp_path / "model" / "manifest.json", format_version=2)
    with pytest.raises(InputError, match=r"format version 2, but this library reads 1\.\.1"):
        load_model_artifact(tmp_path / "model")


def test_a_tokenizer_is_not_a_model(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="expected a model, got a semantic-id tokenizer"):
        load_model_artifact(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "oracle"}, "config.json: there is no system 'oracle'; this library knows: .*retrieval"),
        ({"model": {"languages": {"text": [5, 3, 4]}, "depth": 3}}, "does not know depth"),
        ({"model": {"languages": {"text": [9, 9, 9]}}}, "contradicts itself"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, change, message):
    """A config with a matching hash, as another version of the library may write it."""
    from modules.tokenizer.artifact_folder import file_hashes

    folder = tmp_path / "model"
    save_tiny_artifact(folder)
    change_json(folder / "config.json", **change)
    change_json(folder / "manifest.json", files=file_hashes(folder, ("config.json", "model.safetensors")))
    with pytest.raises(InputError, match=message):
        load_model_artifact(folder)
