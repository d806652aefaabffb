"""metrics.jsonl and the trackers beside it, which are W&B offline and TensorBoard themselves."""

import json
import math
import time
from types import SimpleNamespace

import pytest

from data.schemas import InputError
from training.metrics_log import MetricsLog
from training.run_folder import RunFolder, RunOptions
from training.trackers import TensorBoardFiles, WandbRun

SETTINGS = {"learning_rate": 0.1, "patience": None, "sizes": (1, 2)}


@pytest.fixture
def run(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard comes with requirements-dev.txt")
    return RunFolder.open(tmp_path / "run", RunOptions(), seed=3)


def log_steps(run, first, last, *, after=0, evaluated=0, say=print, wandb_logging=False, tensorboard_logging=True):
    """One life of a run: goes on after a step, logs each step and every fourth evaluation, and ends."""
    run.drop_metrics_after(after, evaluated_step=evaluated)
    log = MetricsLog(run, SETTINGS, wandb_logging=wandb_logging, tensorboard_logging=tensorboard_logging)
    log.start(after, say=say)
    for step in range(first, last + 1):
        log.write(step, float(step), {"train/loss": 1 / step if step != 3 else math.nan, "train/norm": 0.5})
        if step % 4 == 0:
            log.write(step, float(step), {"valid/error": 2.0 * step})
    log.close()


def tensorboard_curves(run):
    """Step and value of every scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.root / "trackers/tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_rows(run):
    """Rows of W&B's history by its own step, of the run's last life; and the ids of all lives."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    ids = set()
    for path in sorted(run.root.glob("trackers/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime):
        rows = {}
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                assert row["_step"] not in rows
                rows[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
    return [rows[step] for step in sorted(rows)], ids


def test_tensorboard_shows_what_was_logged_and_a_gap_for_what_is_not_finite(run):
    log_steps(run, 1, 4)
    curves = tensorboard_curves(run)
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 4]
    assert curves["valid/error"] == [(4, 8.0)]
    assert json.loads(run.metrics_log.read_text().splitlines()[2])["train/loss"] is None


def test_curves_of_a_resumed_run_do_not_overlap(run):
    log_steps(run, 1, 10)
    log_steps(run, 9, 12, after=8, evaluated=8)
    curves = tensorboard_curves(run)
    assert curves["train/norm"] == [(step, 0.5) for step in range(1, 13)]
    assert curves["valid/error"] == [(4, 8.0), (8, 16.0), (12, 24.0)]


def test_a_tracker_that_was_off_catches_up_with_metrics_jsonl(run):
    log_steps(run, 1, 5, tensorboard_logging=False)
    log_steps(run, 6, 8, after=5, evaluated=4)
    curves = tensorboard_curves(run)
    assert [step for step, _ in curves["train/norm"]] == list(range(1, 9))
    assert [step for step, _ in curves["valid/error"]] == [4, 8]


def test_a_tracker_that_fails_is_left_alone_and_that_is_said_once(run, monkeypatch):
    said, calls = [], []

    def fail(self, step, values):
        calls.append(step)
        raise OSError("no route to host")

    monkeypatch.setattr(TensorBoardFiles, "_log", fail)
    log_steps(run, 1, 4, say=said.append)
    assert calls == [1]
    assert said == ["warning: tensorboard failed (no route to host) and is no longer logged to; metrics.jsonl goes on"]
    assert len(run.metrics_log.read_text().splitlines()) == 5


def test_a_tracker_that_does_not_start_ends_the_run_with_one_error(run, monkeypatch):
    (run.root / "trackers").write_text("")
    with pytest.raises(InputError, match=r"TensorBoard did not start .*Make .*trackers writable or set train\.tensorb"):
        log_steps(run, 1, 4)

    def unreachable(self, step):
        raise ConnectionError("no network")

    monkeypatch.setattr(WandbRun, "_open", unreachable)
    (run.root / "trackers").unlink()
    with pytest.raises(InputError, match=r"W&B did not start \(no network\)\. Run `wandb login`, set WANDB_MODE=offl"):
        log_steps(run, 1, 4, wandb_logging=True)


@pytest.mark.parametrize(("tracker", "package"), [("wandb_logging", "wandb"), ("tensorboard_logging", "tensorboard")])
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, tracker, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = RunFolder.open(tmp_path / "run", RunOptions(), seed=3)
    flags = {"wandb_logging": False, "tensorboard_logging": False} | {tracker: True}
    with pytest.raises(InputError, match=rf"train\.{tracker} = True needs the package {package}\. Install it"):
        MetricsLog(run, SETTINGS, **flags)


def test_without_trackers_there_is_metrics_jsonl_alone(run):
    log_steps(run, 1, 3, tensorboard_logging=False)
    assert len(run.metrics_log.read_text().splitlines()) == 3
    assert not (run.root / "trackers").exists()


@pytest.mark.parametrize("first_lost", [0, 5])
def test_lines_that_a_server_does_not_have_are_sent_to_wandb_again(run, monkeypatch, first_lost):
    """Under their numbers; offline that is all of them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    sent = []

    class Fake:
        def __init__(self, project, **settings):
            self.tracker = SimpleNamespace(step=first_lost, define_metric=lambda *names, **settings: None)

        def start(self): ...

        def store_init_configuration(self, settings): ...

        def log(self, values, step):
            sent.append((step, values["step"], "train/norm" in values))

        def finish(self): ...

    monkeypatch.setattr("training.trackers.WandBTracker", Fake)
    trackers = {"wandb_logging": True, "tensorboard_logging": False}
    log_steps(run, 1, 6, **trackers)
    sent.clear()
    log_steps(run, 5, 6, after=4, evaluated=4, **trackers)
    lines = [(1, True), (2, True), (3, True), (4, True), (4, False), (5, True), (6, True)]
    assert sent == [(number, *line) for number, line in enumerate(lines)][first_lost:]


@pytest.mark.slow
def test_wandb_offline_gets_every_row_in_every_life_under_one_id(run, monkeypatch):
    """Interrupted and resumed: the rows of the second life are all those of metrics.jsonl, each once."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_steps(run, 1, 10, wandb_logging=True)
    log_steps(run, 9, 12, after=8, evaluated=8, wandb_logging=True)
    logged = [json.loads(line) for line in run.metrics_log.read_text().splitlines()]
    expected = [
        {name: value for name, value in record.items() if name != "seconds" and value is not None} for record in logged
    ]
    deadline = time.monotonic() + 30
    while len(wandb_rows(run)[0]) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's own process writes its files a moment after it says that it has finished
    rows, ids = wandb_rows(run)
    assert rows == expected
    assert len(ids) == 1
