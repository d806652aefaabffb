import pytest

from data.schemas import InputError
from reports.runs.outcome import duration, outcome_of
from reports.runs.reading import Setting, read_runs
from reports.runs.report import write_run_report
from tests.reports.runs.folders import SELECTION, log_records, write_json, write_log, write_run


def outcome(folder):
    return outcome_of(read_runs([folder])[0])


def test_a_run_that_finished(tmp_path):
    found = outcome(write_run(tmp_path / "run"))
    assert (found.status, found.state, found.reason) == ("good", "finished", "All 100 steps were done.")
    assert (found.step, found.num_steps, found.best_step, found.best_metric) == (100, 100, 80, 0.1)
    assert (found.selection_metric, found.higher_is_better) == (SELECTION, True)
    assert (found.skipped, found.overflowed, found.seconds, found.advice) == (0, 0, 65.2, ())


def test_what_an_older_or_a_foreign_folder_does_not_tell_is_not_guessed(tmp_path):
    run = write_run(tmp_path / "run")
    for environment in ({}, {"selection_metric": "not/logged", "higher_is_better": "yes"}, {"selection_metric": []}):
        write_json(run / "env.json", {"run_format": 1, **environment})
        found = outcome(run)
        assert (found.selection_metric, found.higher_is_better, found.best_metric) == (None, None, 0.1)


def test_a_trial_is_no_run_to_go_on_with(tmp_path):
    run = write_run(tmp_path / "run-dry-run", finished=False, num_steps=500)
    write_json(run / "env.json", {"run_format": 1, "trial": "dry-run"})
    found = outcome(run)
    assert (found.status, found.state, found.advice) == ("good", "trial", ())
    assert found.reason == "A trial (--dry-run) of 100 steps, which has no final metrics."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_steps": 500, "patience": 1}, "It stopped because 1 evaluation in a row brought no improvement."),
        ({"num_steps": 500, "max_minutes": 1.0}, "It stopped because its time was over (max_minutes = 1)."),
        ({"num_steps": 500}, "It ended at step 100; the folder does not say why."),
    ],
)
def test_what_stopped_it(tmp_path, changes, reason):
    assert outcome(write_run(tmp_path / "run", **changes)).reason == reason


def test_a_run_that_was_interrupted_or_is_still_training(tmp_path):
    found = outcome(write_run(tmp_path / "run", finished=False, num_steps=500))
    assert (found.status, found.state) == ("warn", "not finished")
    assert found.reason == "Step 100 is the last that was logged: it was interrupted, or is still training."
    assert found.advice == ("Start the same command with --resume auto to go on from the newest checkpoint.",)


def test_training_ended_and_the_final_metrics_are_not_there(tmp_path):
    reason = outcome(write_run(tmp_path / "run", finished=False)).reason
    assert reason == "All 100 steps were done. The final metrics are missing: it ended before, or is at it."


def test_skipped_and_overflowed_steps_are_counted_over_the_whole_log(tmp_path):
    run = write_run(tmp_path / "run")
    records = log_records(1.0)
    for record in records[:3]:
        record |= {"train/skipped_steps": 2.0, "train/overflow_steps": 1.0}
    write_log(run, records)
    found = outcome(run)
    assert (found.status, found.skipped, found.overflowed) == ("warn", 6, 3)
    assert found.advice[0].startswith("Losses or gradients were not finite. Lower LoopConfig.learning_rate")


def test_a_run_whose_last_loss_was_not_finite(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    write_log(run, [*log_records(1.0), {"step": 110, "seconds": 70.0, "train/loss": None}])
    assert outcome(run).status == "bad"


def test_the_best_evaluation_is_the_last_and_a_baseline_is_ahead(tmp_path):
    run = write_run(tmp_path / "run", scale=0.4)
    records = [record for record in log_records(0.4) if record["step"] <= 80]
    write_log(run, records)
    assert outcome(run).advice == (
        "The last evaluation was the best: more steps may help.",
        "popularity ranks better than generative: ndcg@10 0.0500 against 0.0400 on test.",
    )


def test_a_folder_with_nothing_but_a_log_that_a_crash_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "seconds": 1.5, "train/loss": 2.0}\n{"step": 6, "trai')
    found = outcome(tmp_path)
    assert (found.step, found.num_steps, found.best_metric, found.seconds) == (3, None, None, 1.5)
    assert found.advice[-1].startswith("Missing or damaged: env.json, operative_config.gin")


def test_the_newest_checkpoint_that_can_be_read_counts(tmp_path):
    run = write_run(tmp_path / "run")
    write_json(run / "checkpoints/step_00000120/progress.json", {"step": 120})
    (run / "checkpoints/step_00000140").mkdir()
    (run / "checkpoints/step_00000140/progress.json").write_text('{"step": 140, "ev')
    assert outcome(run).step == 120


def test_settings_are_read_as_written(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run")])
    assert run.settings["train_decoder.train.tokenizer"] == Setting("'a  # b'", "command line")
    assert run.settings["RetrievalModelConfig.languages"] == Setting("<factory>", "default")
    assert run.loop_setting("learning_rate") == 0.001
    assert run.loop_setting("patience") is None


def test_of_two_scripts_in_one_config_the_one_that_trained_here_counts(tmp_path):
    run = write_run(tmp_path / "rqvae")
    text = (
        (run / "operative_config.gin").read_text().replace("train.save_dir_root = 'rqvae'", "train.save_dir_root = 'x'")
    )
    own = (
        "train_rqvae.train.save_dir_root = 'a/rqvae'",
        "train_rqvae.train.loop = @r/LoopConfig()",
        "r/LoopConfig.num_steps = 9",
    )
    (run / "operative_config.gin").write_text(text + "".join(f"{line}  # x.gin:1\n" for line in own))
    assert read_runs([run])[0].loop_setting("num_steps") == 9


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a/one", "a/two"), ["one", "two"]),
        (("a/run", "b/run"), ["a/run", "b/run"]),
        (("a/run", "a/run"), ["1: run", "2: run"]),
    ],
)
def test_names_tell_runs_apart(tmp_path, paths, names):
    for path in paths:
        write_run(tmp_path / path)
    assert [run.name for run in read_runs([tmp_path / path for path in paths])] == names


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"holds none of env\.json, .*Give the folder of a run: the save_dir_root of"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match=r"none is no folder\. Give the folder of a run"):
        read_runs([tmp_path / "none"])


@pytest.mark.parametrize("name", ["env.json", "operative_config.gin", "metrics.jsonl", "metrics.json"])
@pytest.mark.parametrize("damage", [b"", b"\x00\xff\xfe", b"[1, 2]", b'{"step": "x", "seconds": {}, "steps": []}'])
def test_a_damaged_file_spoils_no_more_than_itself(tmp_path, name, damage):
    run = write_run(tmp_path / "run")
    (run / name).write_bytes(damage)
    assert outcome(run).step == 100


def test_durations():
    assert [duration(seconds) for seconds in (41.2, 200, 7500)] == ["41 s", "3 min 20 s", "2 h 5 min"]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 110, "seconds": NaN, "train/loss": Infinity, "train/skipped_steps": NaN}',
        f'{{"step": 110, "train/loss": 1{"0" * 400}, "train/gradient_norm": -1e308, "train/x": 1e308}}',
        f'{{"step": 1{"0" * 400}, "train/loss": 1.0}}',
        '{"step": true, "train/loss": true}',
        "[" * 100_000,
    ],
)
def test_a_log_may_hold_whatever_json_can_say(tmp_path, line):
    """In a file that another program wrote."""
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + line + "\n")
    found = outcome(run)
    assert (found.seconds, found.skipped, found.selection_metric) == (65.2, 0, SELECTION)
    write_run_report(tmp_path / "report.html", [run])
