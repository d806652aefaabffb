import json
import os
import shutil
import threading

import pytest
import torch
from torch import nn

import training.checkpoint
from data.schemas import InputError
from tests.training.small_disks import small_disk, small_files
from tests.training.tiny import LinearTask, train_tiny, weights
from training.checkpoint import CheckpointStore
from training.checkpoint_files import verify, write_checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, keep=2)


def save(store, *steps):
    """Save, one after the other; paths of the checkpoints."""
    saved = []
    for step in steps:
        store.save(step, {"w": torch.full((4,), float(step))}, {"step": step})
        saved.append(store.last())
    return saved


def model_of(value):
    model = nn.Linear(100, 100)
    nn.init.constant_(model.weight, value)
    return model


def best_of(store):
    model = model_of(-1.0)
    store.load_best(model)
    return model.weight.detach()[0, 0].item()


def test_newest_are_kept_and_verify(store, tmp_path):
    save(store, 5, 10, 15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]
    assert names(tmp_path / "step_00000015") == ["manifest.json", "progress.json", "state.pt"]
    verify(tmp_path / "step_00000015")
    state, progress = store.read(tmp_path / "step_00000015")
    torch.testing.assert_close(state["w"], torch.full((4,), 15.0))
    assert progress == {"step": 15}


def test_newest_is_by_number_and_other_names_are_left_alone(store, tmp_path):
    for name in ("step_00000007", "step_notes"):
        (tmp_path / name).write_text("mine")
    _, newer = save(store, 99_999_999, 100_000_000)
    assert newer.name == "step_100000000"
    assert store.choose("auto", discard_newer=False, say=print) == newer
    save(store, 100_000_001)
    assert names(tmp_path) == ["step_00000007", "step_100000000", "step_100000001", "step_notes"]


class Held:
    """Writes of checkpoints that wait until they may go on."""

    def __init__(self, monkeypatch):
        self.began, self.may_write, self.states = threading.Event(), threading.Event(), []
        monkeypatch.setattr(training.checkpoint, "write_checkpoint", self.write)

    def write(self, folder, **content):
        self.began.set()
        assert self.may_write.wait(10)
        self.states.append(content["state"]["w"].tolist())
        write_checkpoint(folder, **content)


def test_training_goes_on_while_a_checkpoint_is_written(store, tmp_path, monkeypatch):
    held = Held(monkeypatch)
    w = torch.ones(2)
    store.save(5, {"w": w}, {})
    w += 1
    assert held.began.wait(10)
    assert names(tmp_path) == [".writing_step_00000005"]
    store.raise_failure()
    held.may_write.set()
    store.wait()
    assert held.states == [[1.0, 1.0]]
    assert names(tmp_path) == ["step_00000005"]


def test_a_checkpoint_waits_for_the_one_before(store, monkeypatch):
    held = Held(monkeypatch)
    store.save(5, {"w": torch.ones(1)}, {})
    threading.Timer(0.05, held.may_write.set).start()
    store.save(10, {"w": torch.ones(1)}, {})
    assert held.states[0] == [1.0]
    store.close()
    assert store.last().name == "step_00000010"


def test_training_draws_the_same_numbers_while_a_checkpoint_is_written(store):
    torch.manual_seed(1)
    alone = torch.rand(4)
    torch.manual_seed(1)
    save(store, 5)
    torch.testing.assert_close(torch.rand(4), alone, rtol=0, atol=0)


def test_damaged_checkpoints_are_skipped_with_a_warning(store, tmp_path):
    older, newer = save(store, 5, 10)
    os.truncate(newer / "state.pt", 100)
    assert store.last() == older
    said = []
    assert store.choose("auto", discard_newer=False, say=said.append) == older
    assert said == [f"warning: skipping the damaged checkpoint {newer}: state.pt was truncated or changed"]
    assert names(tmp_path) == ["step_00000005"]


def test_a_run_of_damaged_checkpoints_alone_is_refused_and_kept(store, tmp_path):
    (checkpoint,) = save(store, 5)
    os.truncate(checkpoint / "state.pt", 100)
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


def test_a_copy_of_a_checkpoint_elsewhere_drops_nothing(store, tmp_path):
    older, newer = save(store, 5, 10)
    shutil.copytree(older, tmp_path / "elsewhere/mine")
    assert store.choose(str(tmp_path / "elsewhere/mine"), discard_newer=True, say=print).name == "mine"
    assert newer.exists()


def test_damage_in_the_folder_of_another_run_is_told_and_left_there(tmp_path):
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    older, newer = save(CheckpointStore(tmp_path / "other/checkpoints", keep=2), 5, 10)
    os.truncate(newer / "state.pt", 100)
    said = []
    mine = CheckpointStore(tmp_path, keep=2)
    assert mine.choose(str(tmp_path / "other"), discard_newer=False, say=said.append) == older
    assert said == [f"warning: skipping the damaged checkpoint {newer}: state.pt was truncated or changed"]
    assert newer.exists()


def test_a_path_that_is_no_checkpoint(store, tmp_path):
    with pytest.raises(InputError, match=r"--resume .*nowhere: not a whole checkpoint \(manifest.json: No such file"):
        store.choose(str(tmp_path / "nowhere"), discard_newer=False, say=print)


def test_best_weights_travel_with_the_checkpoint(store, tmp_path):
    store.save_best(model_of(1.0))
    (checkpoint,) = save(store, 5)
    store.save_best(model_of(2.0))
    assert best_of(store) == 2.0
    store.adopt_best(checkpoint)
    assert best_of(store) == 1.0
    verify(checkpoint)
    store.adopt_best(None)
    assert names(tmp_path) == ["step_00000005"]


def test_damage_to_the_best_weights_of_one_checkpoint_leaves_the_other_whole(store):
    store.save_best(model_of(1.0))
    older, newer = save(store, 5, 10)
    with (newer / "best.safetensors").open("r+b") as file:
        file.write(b"\xff")
    assert store.last() == older
    assert best_of(store) == 1.0


def test_best_weights_that_changed_on_the_disk_are_not_loaded(store, tmp_path):
    store.save_best(model_of(1.0))
    store.wait()
    with (tmp_path / "best.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(InputError, match=r"best.safetensors was changed after it was written"):
        best_of(store)


def test_leftovers_of_a_crash_are_removed(store, tmp_path):
    (tmp_path / ".writing_step_00000005").mkdir()
    (tmp_path / ".deleting_step_00000001").mkdir()
    (tmp_path / ".writing_best").mkdir()
    (tmp_path / ".writing_best/best.safetensors").touch()
    (tmp_path / "notes.txt").write_text("mine")
    store.clean()
    assert names(tmp_path) == ["notes.txt"]


def test_a_checkpoint_comes_back_if_a_crash_met_its_replacement(store, tmp_path, monkeypatch):
    """The same step is saved again when a run that was stopped before an evaluation goes on."""
    (checkpoint,) = save(store, 5)
    rename = os.rename

    def crash(source, target):
        if source.name.startswith(".writing_"):
            raise MemoryError
        rename(source, target)

    monkeypatch.setattr(os, "rename", crash)
    store.save(5, {"w": torch.zeros(1)}, {"step": 5})
    with pytest.raises(MemoryError):
        store.wait()
    monkeypatch.undo()
    assert names(tmp_path) == [".replaced_step_00000005"]
    (tmp_path / ".writing_step_00000005").mkdir()
    store = CheckpointStore(tmp_path, keep=2)
    store.clean()
    assert names(tmp_path) == ["step_00000005"]
    verify(checkpoint)
    (tmp_path / ".replaced_step_00000005").mkdir()
    store.clean()
    assert names(tmp_path) == ["step_00000005"]
    store.save(5, {"w": torch.zeros(1)}, {"step": 5, "again": True})
    assert store.read(store.last())[1]["again"]
    assert names(tmp_path) == ["step_00000005"]


def test_a_quota_leaves_the_previous_checkpoint_whole(store, tmp_path):
    store.save_best(model_of(1.0))
    (older,) = save(store, 5)
    with small_files():
        store.save(10, {"w": torch.zeros(100_000)}, {})
        with pytest.raises(InputError, match=r"could not write .*step_00000010: the file size limit") as caught:
            store.wait()
    assert f"The last whole checkpoint is {older}." in str(caught.value)
    assert names(tmp_path) == ["best.safetensors", "step_00000005"]
    verify(older)


def test_a_quota_leaves_the_previous_best_weights_whole(store, tmp_path):
    store.save_best(model_of(1.0))
    store.wait()
    with small_files():
        store.save_best(model_of(2.0))
        with pytest.raises(InputError, match=r"could not write .*best.safetensors: .*File too large"):
            store.wait()
    assert best_of(CheckpointStore(tmp_path, keep=2)) == 1.0
    assert names(tmp_path) == ["best.safetensors"]


def test_nothing_is_written_after_a_failure(store, tmp_path):
    """A checkpoint must not be paired with other best weights than those it counts on."""
    with small_files():
        store.save_best(model_of(1.0))
        store.last()
    with pytest.raises(InputError, match=r"could not write .*best.safetensors"):
        store.save(5, {}, {"best_step": 5})
    assert names(tmp_path) == []


def test_a_full_disk_leaves_what_was_there_whole(tmp_path):
    with small_disk(tmp_path, 1_000_000) as disk:
        store = CheckpointStore(tmp_path, keep=2)
        store.save_best(model_of(1.0))
        (older,) = save(store, 5)
        disk.fill(but=20_000)
        store.save(10, {"w": torch.zeros(9000)}, {})
        with pytest.raises(InputError, match=r"could not write .*step_00000010: the disk is full") as caught:
            store.close()
        assert f"The last whole checkpoint is {older}." in str(caught.value)
        assert names(tmp_path) == ["best.safetensors", "filler", "step_00000005"]
        disk.empty()
        store = CheckpointStore(tmp_path, keep=2)
        assert store.choose("auto", discard_newer=False, say=print) == older
        store.adopt_best(older)
        save(store, 10)
        assert store.last().name == "step_00000010"


def test_a_full_disk_leaves_the_best_weights_whole(tmp_path):
    with small_disk(tmp_path, 1_000_000) as disk:
        store = CheckpointStore(tmp_path, keep=2)
        store.save_best(model_of(1.0))
        (checkpoint,) = save(store, 5)
        disk.fill(but=20_000)
        store.save_best(model_of(2.0))
        with pytest.raises(InputError, match=r"could not write .*best.safetensors: .*No space left"):
            store.wait()
        store = CheckpointStore(tmp_path, keep=2)
        with pytest.raises(InputError, match=r"could not write .*best.safetensors: the disk is full"):
            store.adopt_best(checkpoint)
        assert names(tmp_path) == ["best.safetensors", "filler", "step_00000005"]
        assert best_of(store) == 1.0


def test_a_read_only_folder_is_one_clear_error(tmp_path):
    with small_disk(tmp_path, 1_000_000) as disk:
        (older,) = save(CheckpointStore(tmp_path, keep=2), 5)
        disk.forbid_writing()
        store = CheckpointStore(tmp_path, keep=2)
        store.save_best(model_of(1.0))
        with pytest.raises(InputError, match=r"could not write .*best.safetensors: the file system is read-only"):
            store.wait()
        store = CheckpointStore(tmp_path, keep=2)
        store.save(10, {}, {})
        with pytest.raises(InputError, match=r"could not write .*step_00000010: the file system is read-only"):
            store.wait()
        assert store.last() == older


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


def test_training_ends_at_a_full_disk_and_goes_on_once_there_is_space(tmp_path):
    whole = LinearTask()
    train_tiny(tmp_path / "whole", whole)
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        run = disk.folder / "run"
        train_tiny(run, LinearTask(), num_steps=10)
        disk.fill(but=24_000)
        with pytest.raises(InputError, match=r"checkpoints/step_00000015: the disk is full. The last whole .*00000010"):
            train_tiny(run, LinearTask(), resume="auto")
        disk.empty()
        resumed = LinearTask()
        train_tiny(run, resumed, resume="auto")
        checkpoints = names(run / "checkpoints")
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert checkpoints == ["best.safetensors", *(f"step_{step:08d}" for step in (5, 10, 15, 20))]


def test_resuming_leaves_no_second_name_of_the_best_weights(tmp_path):
    train_tiny(tmp_path, LinearTask())
    train_tiny(tmp_path, LinearTask(), resume="auto")
    assert names(tmp_path / "checkpoints") == ["best.safetensors", *(f"step_{step:08d}" for step in (5, 10, 15, 20))]
