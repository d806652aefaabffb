import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from data.schemas import Catalogue, InputError
from modules.estimators import QuantizeMode
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer import assign
from modules.tokenizer.hub import resolve_folder
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tests.conftest import REPOSITORY
from tests.modules.hub_server import serve_hub

NUM_ITEMS = 40
DATA_FILES = ["config.json", "quantizers/text.safetensors", "semantic_ids/text.safetensors", "catalogue.safetensors"]


def make_features(num_items=NUM_ITEMS):
    features = torch.randn(num_items, 6, generator=torch.Generator().manual_seed(0))
    features[5] = features[9] = features[2]  # one group of three
    return features


def make_catalogue(num_items=NUM_ITEMS):
    keys = [f"B{item:03d}" for item in range(num_items)]
    return Catalogue(keys, [f"Título {key}" for key in keys], ["A > B"] * num_items, torch.arange(num_items) % 3 == 0)


def make_rqvae(**settings):
    torch.manual_seed(1)
    rqvae = RqVae(RqVaeConfig(input_dim=6, embed_dim=4, hidden_dims=(8,), codebook_sizes=(16, 16), **settings))
    rqvae.initialize_codebooks_(make_features())
    return rqvae


def make_tokenizer(rqvae=None, **settings):
    return SemanticIdTokenizer.fit(
        rqvae or make_rqvae(),
        make_features(),
        make_catalogue(),
        feature_description={"encoder": "tfidf_svd", "dim": 6},
        dataset_manifest_hash="d0",
        metrics={"reconstruction_error": 0.25},
        provenance={"commit": "c0ffee"},
        **settings,
    )


@pytest.fixture
def folder(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fit_gives_every_item_an_id_of_its_own():
    tokenizer = make_tokenizer()
    assert tokenizer.num_items == NUM_ITEMS
    assert tokenizer.level_sizes == (16, 16, 8)  # three items share codes: the dedup level holds at least six
    assert tokenizer.semantic_ids.shape == (NUM_ITEMS, 3)
    assert len(tokenizer.semantic_ids.unique(dim=0)) == NUM_ITEMS
    group = tokenizer.semantic_ids[[2, 5, 9]]
    assert len(group[:, :2].unique(dim=0)) == 1
    assert group[:, 2].diff().gt(0).all()


def test_ids_are_stable_under_reruns():
    first, again = make_tokenizer(), make_tokenizer()
    assert torch.equal(first.semantic_ids, again.semantic_ids)
    assert first.content_hash == again.content_hash


def test_dedup_level_can_be_given_and_overflows_with_one_clear_error():
    assert make_tokenizer(dedup_size=64).level_sizes == (16, 16, 64)
    with pytest.raises(InputError, match="item_id 9 would be number 3 of its tuple"):
        make_tokenizer(dedup_size=2)


def test_tokenizer_is_frozen_and_independent_of_further_training():
    rqvae = make_rqvae().train()
    tokenizer = make_tokenizer(rqvae)
    before = tokenizer.encode(make_features())
    with torch.no_grad():
        for parameter in rqvae.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(tokenizer.encode(make_features()), before)
    assert rqvae.training
    assert all(parameter.requires_grad for parameter in rqvae.parameters())
    assert not tokenizer.rqvae.training
    assert not any(parameter.requires_grad for parameter in tokenizer.rqvae.parameters())


def test_codes_do_not_depend_on_autocast():
    tokenizer = make_tokenizer()
    features = torch.randn(3000, 6, generator=torch.Generator().manual_seed(2))
    exact = tokenizer.encode(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(features), exact)


def test_content_hash_does_not_depend_on_the_integer_type():
    tokenizer = make_tokenizer()
    narrow = SemanticIdTokenizer(
        tokenizer.rqvae,
        tokenizer.semantic_ids.int(),
        tokenizer.level_sizes,
        tokenizer.catalogue,
        language="text",
        manifest={},
    )
    assert narrow.content_hash == tokenizer.content_hash


def test_an_item_gets_the_same_codes_alone_and_among_others(monkeypatch):
    torch.manual_seed(0)
    rqvae = RqVae(RqVaeConfig(input_dim=64, hidden_dims=(96, 48), codebook_sizes=(64, 64)))
    features = torch.randn(3000, 64)
    rqvae.initialize_codebooks_(features)
    catalogue = make_catalogue(3000)
    tokenizer = SemanticIdTokenizer.fit(rqvae, features, catalogue, feature_description={}, dataset_manifest_hash="")
    for row in (0, 1023, 1024, 2999):
        assert torch.equal(tokenizer.encode(features[row : row + 1])[0], tokenizer.semantic_ids[row, :-1])
    shuffled = torch.randperm(3000)
    shapes = []
    semantic_ids = RqVae.semantic_ids
    monkeypatch.setattr(
        RqVae, "semantic_ids", lambda self, x, **options: shapes.append(x.shape) or semantic_ids(self, x)
    )
    assert torch.equal(tokenizer.encode(features[shuffled]), tokenizer.semantic_ids[shuffled, :-1])
    assert shapes == [(1024, 64)] * 3  # products of one shape round alike, so near-ties fall alike


def test_features_may_be_a_read_only_memory_map(tmp_path):
    np.save(tmp_path / "features.npy", make_features().numpy().astype(np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    codes = make_tokenizer().encode(mapped)
    assert torch.equal(codes, make_tokenizer().encode(make_features().half()))


def test_an_encoder_in_half_precision_is_remembered(tmp_path):
    tokenizer = make_tokenizer(encoder_dtype="bfloat16")
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.manifest["encoder_dtype"] == "bfloat16"
    assert torch.equal(loaded.encode(make_features()), tokenizer.semantic_ids[:, :-1])
    features = torch.randn(2000, 6, generator=torch.Generator().manual_seed(2))
    same = (loaded.encode(features) == make_tokenizer().encode(features)).all(dim=1).float().mean()
    assert 0.8 < same < 1.0
    with pytest.raises(InputError, match="float32, float16, bfloat16, got 'int8'"):
        make_tokenizer(encoder_dtype="int8")


def test_large_features_are_not_taken_for_infinite_ones():
    features = make_features()
    features[7] = 3e38  # the row's sum overflows
    make_tokenizer().encode(features)
    features[7, 3] = torch.inf
    with pytest.raises(InputError, match="row 7"):
        make_tokenizer().encode(features)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_rows", [1, 700, 1200])
def test_streamed_features_get_the_codes_of_features_on_the_device(tmp_path, monkeypatch, num_rows):
    monkeypatch.setitem(assign.BLOCK_ROWS, "cuda", 200)
    rqvae = make_rqvae().cuda().eval()
    features = torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(2)).half()
    expected = assign.assign_codes(rqvae, features.cuda())
    np.save(tmp_path / "features.npy", features.numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert torch.equal(assign.assign_codes(rqvae, features), expected)
    assert torch.equal(assign.assign_codes(rqvae, mapped), expected)


def test_encoding_no_rows():
    assert make_tokenizer().encode(torch.zeros(0, 6)).shape == (0, 2)


def test_artifact_has_the_documented_files(folder):
    assert sorted(snapshot(folder)) == sorted([*DATA_FILES, "manifest.json", "README.md"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "semantic-id tokenizer"
    assert manifest["format_version"] == 2
    assert sorted(manifest["files"]) == sorted(DATA_FILES)
    assert manifest["features"] == {"encoder": "tfidf_svd", "dim": 6}
    assert manifest["dataset_manifest_hash"] == "d0"
    assert manifest["provenance"] == {"commit": "c0ffee"}
    assert manifest["metrics"]["reconstruction_error"] == 0.25
    assert manifest["metrics"]["codebook/largest_group"] >= 3
    card = (folder / "README.md").read_text()
    for phrase in ("in use", "entropy", "collision rate", "reconstruction_error: 0.25", "tfidf_svd"):
        assert phrase in card


@pytest.mark.parametrize("mode", QuantizeMode)
def test_round_trip(tmp_path, mode):
    tokenizer = make_tokenizer(make_rqvae(mode=mode, sim_vq=True, codebook_normalize=True))
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.semantic_ids, tokenizer.semantic_ids)
    assert loaded.semantic_ids.dtype == torch.int64
    assert loaded.level_sizes == tokenizer.level_sizes
    assert loaded.language == "text"
    assert loaded.manifest == tokenizer.manifest
    assert loaded.content_hash == tokenizer.content_hash
    assert loaded.rqvae.config == tokenizer.rqvae.config
    assert loaded.rqvae.codebooks_initialized
    assert loaded.catalogue.item_keys == tokenizer.catalogue.item_keys
    assert loaded.catalogue.titles == tokenizer.catalogue.titles
    assert torch.equal(loaded.catalogue.cold, tokenizer.catalogue.cold)
    assert torch.equal(loaded.encode(make_features()), tokenizer.semantic_ids[:, :-1])
    loaded.save_pretrained(tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_another_language_has_its_own_files(tmp_path):
    make_tokenizer(language="image").save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "quantizers" / "image.safetensors").is_file()
    assert SemanticIdTokenizer.from_pretrained(tmp_path / "a").language == "image"
    with pytest.raises(InputError, match="language"):
        make_tokenizer(language="../image")


def test_content_hash_follows_meaning_only():
    tokenizer = make_tokenizer()
    catalogue = make_catalogue()
    untitled = Catalogue(catalogue.item_keys, [""] * NUM_ITEMS, catalogue.categories)
    other_keys = Catalogue([*catalogue.item_keys[:-1], "B999"], catalogue.titles, catalogue.categories)

    def hash_with(catalogue, rqvae):
        return SemanticIdTokenizer.fit(
            rqvae, make_features(), catalogue, feature_description={"note": 1}, dataset_manifest_hash="other"
        ).content_hash

    assert hash_with(untitled, make_rqvae()) == tokenizer.content_hash
    assert hash_with(other_keys, make_rqvae()) != tokenizer.content_hash
    changed = make_rqvae()
    with torch.no_grad():
        changed.decoder.linears[0].bias.add_(1e-3)
    assert hash_with(catalogue, changed) != tokenizer.content_hash
    assert hash_with(catalogue, make_rqvae(mode=QuantizeMode.GUMBEL_SOFTMAX)) != tokenizer.content_hash


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(NUM_ITEMS - 1, 6), "expected features of 40 catalogue items, got 39 rows"),
        (torch.zeros(NUM_ITEMS, 5), r"input_dim=6\), got \[40, 5\]"),
        (torch.full((NUM_ITEMS, 6), float("nan")), "NaN or infinity in row 0"),
    ],
)
def test_fit_refuses_features(features, message):
    with pytest.raises(InputError, match=message):
        SemanticIdTokenizer.fit(
            make_rqvae(), features, make_catalogue(), feature_description={}, dataset_manifest_hash=""
        )


@pytest.mark.parametrize("name", [*DATA_FILES[1:], "config.json"])
def test_damaged_truncated_and_missing_files(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=path.name):
            SemanticIdTokenizer.from_pretrained(folder)
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        SemanticIdTokenizer.from_pretrained(folder)


def test_damaged_manifest(folder):
    (folder / "manifest.json").write_text('{"kind": "semantic-id')
    with pytest.raises(InputError, match=r"manifest\.json is not readable as JSON"):
        SemanticIdTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format version 3, but this library reads 1..2. Update the library"),
        ({"format_version": "1"}, "format version 1"),
        ({"kind": "retrieval model"}, "expected a semantic-id tokenizer, got a retrieval model"),
        ({"files": {}}, "no hash of config.json"),
        ({"content_hash": "0"}, "content hash"),
    ],
)
def test_manifest_of_another_kind(folder, changes, message):
    edit_json(folder / "manifest.json", **changes)
    with pytest.raises(InputError, match=message):
        SemanticIdTokenizer.from_pretrained(folder)


def test_configuration_that_does_not_fit_its_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    config["languages"]["text"]["rqvae"]["embed_dim"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    from modules.tokenizer.artifact_folder import file_hashes

    edit_json(folder / "manifest.json", files={**manifest["files"], **file_hashes(folder, ["config.json"])})
    with pytest.raises(InputError, match="contradicts itself"):
        SemanticIdTokenizer.from_pretrained(folder)


def test_edited_model_card_does_not_matter(folder):
    (folder / "README.md").write_text("my words")
    assert SemanticIdTokenizer.from_pretrained(folder).num_items == NUM_ITEMS


def test_saving_replaces_a_tokenizer_but_nothing_else(tmp_path, folder):
    make_tokenizer(language="image").save_pretrained(folder)
    assert SemanticIdTokenizer.from_pretrained(folder).language == "image"
    assert not (folder / "quantizers" / "text.safetensors").exists()

    other = tmp_path / "thesis"
    other.mkdir()
    make_tokenizer().save_pretrained(other)  # empty: welcome
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    with pytest.raises(InputError, match="is not a semantic-id tokenizer"):
        make_tokenizer().save_pretrained(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.txt").read_text() == "meow"
    with pytest.raises(InputError, match="is not a semantic-id tokenizer"):
        make_tokenizer().save_pretrained(tmp_path / "photos" / "cat.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "thesis", "tokenizer"]


def test_a_failed_save_leaves_the_old_artifact(monkeypatch, folder):
    before = snapshot(folder)

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("modules.tokenizer.stored.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        make_tokenizer(language="image").save_pretrained(folder)
    assert snapshot(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_a_failed_rename_restores_the_old_artifact(monkeypatch, folder):
    before = snapshot(folder)
    rename = type(folder).rename

    def failing(self, target):
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", failing)
    with pytest.raises(InputError, match="Input/output error"):
        make_tokenizer(language="image").save_pretrained(folder)
    assert snapshot(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make_tokenizer().save_pretrained(tmp_path / "file" / "tokenizer")


@pytest.mark.parametrize("place", ["runs/beauty/model", "./nowhere", "/nowhere", "what is this", "..", "a/b/"])
def test_paths_that_are_neither_folder_nor_hub_id(tmp_path, monkeypatch, place):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    if place == "..":
        assert resolve_folder(place).resolve() == tmp_path
        return
    with pytest.raises(InputError, match=r"is not a folder, nor a Hub id|could not be downloaded"):
        resolve_folder(place)


def test_folder_without_an_artifact(tmp_path):
    with pytest.raises(InputError, match=r"is not a semantic-id tokenizer: it has no manifest\.json"):
        SemanticIdTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="revision='v1' cannot apply"):
        SemanticIdTokenizer.from_pretrained(tmp_path, revision="v1")


ONLINE = """
import sys
from data.schemas import InputError
from modules.tokenizer.legacy import load_legacy
from modules.tokenizer.tokenizer import SemanticIdTokenizer

tokenizer = SemanticIdTokenizer.from_pretrained("someone/tokenizer")
print("loaded", tokenizer.content_hash)
print("commit", tokenizer.push_to_hub("me/copy"))
print("pushed", SemanticIdTokenizer.from_pretrained("me/copy").content_hash)
for hub_id, revision in (("someone/absent", None), ("someone/tokenizer", "v9"), ("someone/photos", None)):
    try:
        SemanticIdTokenizer.from_pretrained(hub_id, revision=revision)
    except InputError as error:
        print("refused", error)
"""

OFFLINE = """
from data.schemas import InputError
from modules.tokenizer.tokenizer import SemanticIdTokenizer

print("cached", SemanticIdTokenizer.from_pretrained("someone/tokenizer").content_hash)
for use in (lambda: SemanticIdTokenizer.from_pretrained("someone/uncached"),
            lambda: SemanticIdTokenizer.from_pretrained("someone/tokenizer").push_to_hub("me/other")):
    try:
        use()
    except InputError as error:
        print("refused", error)
"""


def run_with_hub(script, endpoint, cache, **environment):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_hub(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "hub" / "someone" / "tokenizer")
    (tmp_path / "hub" / "someone" / "tokenizer" / "pickle.bin").write_bytes(b"never downloaded")
    (tmp_path / "hub" / "someone" / "photos").mkdir()
    with serve_hub(tmp_path / "hub") as (endpoint, requests):
        lines = run_with_hub(ONLINE, endpoint, tmp_path / "cache")
        assert lines[0] == f"loaded {tokenizer.content_hash}"
        assert lines[1].startswith(f"commit {endpoint}/me/copy/commit/")
        assert lines[2] == f"pushed {tokenizer.content_hash}"
        assert "does not exist or is private" in lines[3]
        assert "someone/absent" in lines[3]
        assert "no such revision" in lines[4]
        assert "it has no manifest.json" in lines[5]
        assert len(lines) == 6
        assert any("semantic_ids/text.safetensors" in request for request in requests)
        assert not any("pickle.bin" in request for request in requests)
        assert snapshot(tmp_path / "hub" / "me" / "copy").keys() == snapshot_keys_of_artifact()

    lines = run_with_hub(OFFLINE, endpoint, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert lines[0] == f"cached {tokenizer.content_hash}"
    assert "Go online once to fill the cache, or copy the repository into a folder" in lines[1]
    assert "upload to Hub repository 'me/other' failed" in lines[2]


def snapshot_keys_of_artifact():
    return {*DATA_FILES, "manifest.json", "README.md"}
