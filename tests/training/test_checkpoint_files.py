"""What is read from a checkpoint is what was written, or nothing is."""

import json
import os
import random
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from data.files import file_sha256, json_sha256
from data.schemas import InputError
from training.checkpoint_files import (
    DamagedCheckpointError,
    StoredWeights,
    host_copy,
    read_checkpoint,
    verify,
    write_checkpoint,
)

STATE = {"model": {"w": torch.arange(6.0)}, "random": [{"torch": [1, 2, 3]}], "scaler": None}


@pytest.fixture
def checkpoint(tmp_path):
    weights = tmp_path / "best.safetensors"
    save_file({"w": torch.ones(3)}, weights)
    folder = tmp_path / "step_00000005"
    folder.mkdir()
    best = StoredWeights(weights, file_sha256(weights))
    write_checkpoint(folder, step=5, state=STATE, progress=b'{"step": 5}', best=best)
    return folder


def content(checkpoint):
    state, progress = read_checkpoint(checkpoint)
    return state["model"]["w"].tolist(), state["random"], state["scaler"], progress


def rewrite_manifest(checkpoint, *, sign=True, **changes):
    """Change the manifest as another program would; `sign` gives it the right checksum of its own."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    manifest |= changes
    if sign:
        manifest["manifest_sha256"] = json_sha256(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def digests(checkpoint, **changes):
    listed = {path.name: file_sha256(path) for path in checkpoint.iterdir() if path.name != "manifest.json"}
    return {name: digest for name, digest in (listed | changes).items() if digest is not None}


def test_what_was_written_is_read(checkpoint):
    assert sorted(os.listdir(checkpoint)) == ["best.safetensors", "manifest.json", "progress.json", "state.pt"]
    verify(checkpoint)
    assert content(checkpoint) == ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [{"torch": [1, 2, 3]}], None, {"step": 5})
    assert json.loads((checkpoint / "manifest.json").read_text())["sha256"] == digests(checkpoint)


def test_a_hundred_flipped_bits_are_found_or_harmless(checkpoint):
    before, draw, found = content(checkpoint), random.Random(6), 0
    for number in range(100):
        file = sorted(checkpoint.iterdir())[number % 4]
        data = file.read_bytes()
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            verify(checkpoint)
        except DamagedCheckpointError:
            found += 1
        else:
            assert content(checkpoint) == before, (file.name, place, bit)
        file.write_bytes(data)
    verify(checkpoint)
    assert found > 90


@pytest.mark.parametrize("name", ["best.safetensors", "manifest.json", "progress.json", "state.pt"])
def test_a_file_that_was_cut_short_is_found(checkpoint, name):
    length = (checkpoint / name).stat().st_size
    for kept in (0, 1, length // 2, length - 1):
        with (checkpoint / name).open("r+b") as file:
            file.truncate(kept)
        with pytest.raises(DamagedCheckpointError, match=name):
            verify(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "best.safetensors").unlink(), "best.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda path: (path / "more.pt").touch(), "more.pt is not in manifest.json"),
        (lambda path: (path / "folder").mkdir(), "folder is not in manifest.json"),
        (lambda path: ((path / "state.pt").unlink(), (path / "state.pt").mkdir()), "state.pt: Is a directory"),
        (shutil.rmtree, "manifest.json: No such file"),
        (lambda path: rewrite_manifest(path, sign=False), "manifest.json was changed"),
        (lambda path: rewrite_manifest(path, sign=False, step=6), "manifest.json was changed"),
        (lambda path: rewrite_manifest(path, sha256={}), "best.safetensors is not in manifest.json"),
        (lambda path: rewrite_manifest(path, sha256=digests(path, **{"state.pt": None})), "state.pt is not in"),
        (lambda path: rewrite_manifest(path, sha256=digests(path, **{"../x": "0"})), "../x is missing"),
        (lambda path: rewrite_manifest(path, sha256=digests(path, **{"state.pt": 7})), "state.pt was truncated or"),
    ],
)
def test_what_is_not_as_it_was_written_is_damage(checkpoint, damage, message):
    (checkpoint.parent / "x").write_text("outside")
    damage(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=message):
        verify(checkpoint)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ("", "not readable"),
        ("\xff\xfe", "not readable"),
        ('{"format": 1', "not readable"),
        ("[]", "not that of a checkpoint"),
        ("7", "not that of a checkpoint"),
        ('{"name": "something else"}', "not that of a checkpoint"),
        ('{"format": 1, "sha256": ["state.pt"]}', "not that of a checkpoint"),
        ('{"sha256": {}}', "manifest.json was changed"),
        ('{"format": "one", "sha256": {}}', "manifest.json was changed"),
    ],
)
def test_foreign_manifests_are_damage(checkpoint, foreign, message):
    (checkpoint / "manifest.json").write_text(foreign, encoding="latin-1")
    with pytest.raises(DamagedCheckpointError, match=message):
        verify(checkpoint)


def test_the_older_format_without_a_checksum_of_the_manifest_is_read(checkpoint):
    rewrite_manifest(checkpoint, sign=False, format=1)
    verify(checkpoint)
    (checkpoint / "state.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"state.pt was truncated"):
        verify(checkpoint)


def test_a_newer_format_is_no_damage(checkpoint):
    """It must not be removed as damage is."""
    rewrite_manifest(checkpoint, format=3)
    with pytest.raises(InputError, match=r"newer version of this library \(checkpoint format 3, this one reads up to"):
        verify(checkpoint)


def test_best_weights_that_changed_on_the_disk_are_not_taken(checkpoint, tmp_path):
    changed = StoredWeights(tmp_path / "best.safetensors", "0")
    (tmp_path / "next").mkdir()
    with pytest.raises(InputError, match=r"best.safetensors was changed after it was written"):
        write_checkpoint(tmp_path / "next", step=6, state=STATE, progress=b"{}", best=changed)


def test_a_host_copy_shares_nothing():
    weight = torch.arange(4.0).requires_grad_()
    state = OrderedDict(w=weight, view=weight[:2], rows=[torch.zeros(2).expand(3, 2)], plain=(1, "a", None))
    copied = host_copy(state)
    with torch.no_grad():
        weight += 1
    assert copied["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert copied["view"].untyped_storage().nbytes() == 8
    assert copied["rows"][0].tolist() == [[0.0, 0.0]] * 3
    assert copied["plain"] == (1, "a", None)
    assert not copied["w"].requires_grad
