import json
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from data.schemas import InputError
from tests.training.tiny import LinearTask, train_tiny, weights
from training.checkpoint import CheckpointStore, DamagedCheckpointError, verify


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, keep=2)


def save(store, *steps):
    return [store.save(step, {"w": torch.full((4,), float(step))}, {"step": step}) for step in steps]


def test_newest_are_kept_and_verify(store, tmp_path):
    save(store, 5, 10, 15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]
    assert names(tmp_path / "step_00000015") == ["manifest.json", "progress.json", "state.pt"]
    verify(tmp_path / "step_00000015")
    state, progress = store.read(tmp_path / "step_00000015")
    torch.testing.assert_close(state["w"], torch.full((4,), 15.0))
    assert progress == {"step": 15}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path / "state.pt", 100), "state.pt was truncated or changed"),
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "progress.json").write_text("{}"), "progress.json was truncated or changed"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1'), "manifest.json is not readable"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda path: (path / "manifest.json").write_text('{"format": 2, "sha256": {}}'), "format 2, this version"),
    ],
)
def test_damaged_checkpoints_are_skipped_with_a_warning(store, tmp_path, damage, message):
    older, newer = save(store, 5, 10)
    damage(newer)
    with pytest.raises(DamagedCheckpointError, match=message):
        verify(newer)
    said = []
    assert store.choose("auto", discard_newer=False, say=said.append) == older
    assert len(said) == 1
    assert f"skipping the damaged checkpoint {newer}: {message}" in said[0]
    assert names(tmp_path) == ["step_00000005"]


def test_a_single_flipped_bit_is_found(store, tmp_path):
    (checkpoint,) = save(store, 5)
    data = bytearray((checkpoint / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(data)
    with pytest.raises(InputError, match="holds 1 checkpoints and none is whole"):
        store.choose("auto", discard_newer=False, say=lambda line: None)
    assert checkpoint.exists()


def test_auto_without_a_checkpoint_starts_fresh_and_says_so(store, tmp_path):
    said = []
    assert store.choose("auto", discard_newer=False, say=said.append) is None
    assert said == [f"--resume auto: no checkpoint in {tmp_path}, starting from the beginning"]


def test_resuming_an_older_checkpoint_never_drops_newer_ones_silently(store, tmp_path):
    older, _ = save(store, 5, 10)
    with pytest.raises(InputError, match="the run went on to step_00000010"):
        store.choose(str(older), discard_newer=False, say=print)
    assert names(tmp_path) == ["step_00000005", "step_00000010"]
    assert store.choose(str(older), discard_newer=True, say=print) == older
    assert names(tmp_path) == ["step_00000005"]


def test_a_path_that_is_no_checkpoint(store, tmp_path):
    with pytest.raises(InputError, match=r"--resume .*nowhere: not a whole checkpoint \(manifest.json: No such file"):
        store.choose(str(tmp_path / "nowhere"), discard_newer=False, say=print)


def test_best_weights_travel_with_the_checkpoint(store, tmp_path):
    model = nn.Linear(2, 2)
    store.save_best(model)
    best_then = model.weight.detach().clone()
    (checkpoint,) = save(store, 5)
    with torch.no_grad():
        model.weight.add_(1.0)
    store.save_best(model)
    store.adopt_best(checkpoint)
    store.load_best(model)
    torch.testing.assert_close(model.weight.detach(), best_then)
    verify(checkpoint)
    store.adopt_best(None)
    assert names(tmp_path) == ["step_00000005"]


def test_leftovers_of_a_crash_are_removed(store, tmp_path):
    (tmp_path / ".writing_step_00000005").mkdir()
    (tmp_path / ".deleting_step_00000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    store.clean()
    assert names(tmp_path) == ["notes.txt"]


@contextmanager
def small_files():
    """No file may grow past 4 KiB, as on a disk that is full.

    Left before the test ends: pytest's own output may be a longer file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_the_previous_checkpoint_whole(store, tmp_path):
    (older,) = save(store, 5)
    full = pytest.raises(InputError, match=r"could not write .*step_00000010: the file size limit is reached")
    with full as caught, small_files():
        store.save(10, {"w": torch.zeros(100_000)}, {})
    assert f"The last whole checkpoint is {older}." in str(caught.value)
    assert names(tmp_path) == ["step_00000005"]
    verify(older)


def test_full_disk_leaves_the_previous_best_whole(store, tmp_path):
    model = nn.Linear(100, 100)
    store.save_best(model)
    best = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(InputError, match=r"could not write .*best.safetensors"), small_files():
        store.save_best(model)
    store.load_best(model)
    torch.testing.assert_close(model.weight.detach(), best)
    assert names(tmp_path) == ["best.safetensors"]


def test_training_goes_on_from_the_whole_checkpoint_after_damage(tmp_path, capsys):
    whole = LinearTask()
    train_tiny(tmp_path / "whole", whole)
    train_tiny(tmp_path / "run", LinearTask(), num_steps=15)
    newest = tmp_path / "run/checkpoints/step_00000015"
    os.truncate(newest / "state.pt", 1000)
    resumed = LinearTask()
    train_tiny(tmp_path / "run", resumed, resume="auto")
    error = capsys.readouterr().err
    assert f"warning: skipping the damaged checkpoint {newest}: state.pt was truncated or changed" in error
    assert "resumed from " in error
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 10, 15, 20, 20]


def test_resuming_leaves_no_second_name_of_the_best_weights(tmp_path):
    """Replacing a hard link by another one of the same file does nothing, and keeps both names."""
    train_tiny(tmp_path, LinearTask())
    (tmp_path / "checkpoints/.best.safetensors.tmp").write_bytes(b"cut short by a crash")
    train_tiny(tmp_path, LinearTask(), resume="auto")
    assert names(tmp_path / "checkpoints") == ["best.safetensors", *(f"step_{step:08d}" for step in (5, 10, 15, 20))]
