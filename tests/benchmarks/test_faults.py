import json
import random
import signal
from collections import Counter
from itertools import islice

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.fault_damage import Victim, damage_cases, flipped_bits, interrupt
from benchmarks.fault_kills import IN_A_WRITE, Pace, Tally, _enough, _moment, _place, kill_campaign, measure_pace
from benchmarks.fault_lives import _FRAME
from benchmarks.fault_runs import QUICK_SETTINGS, DemoRun, FaultError, require_outcome

SHORT = QUICK_SETTINGS | {"rqvae/LoopConfig.num_steps": 20, "decoder/LoopConfig.num_steps": 20}
STACK = """Thread 0x00007f (most recent call first):
  File "/x/training/checkpoint_files.py", line 95 in write_checkpoint
Current thread 0x00008f (most recent call first):
  File "/x/training/step.py", line 80 in __call__
  File "/x/training/loop.py", line 220 in _step
"""


@pytest.fixture
def run(tmp_path):
    return DemoRun(tmp_path / "run", SHORT)


def write_finished_run(run: DemoRun, loss: float) -> None:
    """The folders of a run that ended, as far as `outcome` needs them."""
    for stage in run.stages:
        checkpoint = stage / "checkpoints" / "step_00000010"
        checkpoint.mkdir(parents=True)
        torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"state": [1, 2.5]}}, checkpoint / "state.pt")
        (stage / "metrics.json").write_text(json.dumps({"valid/loss": loss, "seconds": random.random()}))
        (stage / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/examples_per_second": random.random()}))
        save_file({"w": torch.ones(2)}, stage / "ranks_test.safetensors")


def test_outcomes_are_equal_but_for_times(run, tmp_path):
    write_finished_run(run, loss=1.0)
    same, other = run.anew(tmp_path / "same"), run.anew(tmp_path / "other")
    write_finished_run(same, loss=1.0)
    require_outcome(same, run.outcome())
    write_finished_run(other, loss=1.5)
    with pytest.raises(FaultError, match=r"uninterrupted run: decoder/metrics\.json, rqvae/metrics\.json$"):
        require_outcome(other, run.outcome())
    state = same.model / "checkpoints" / "step_00000010" / "state.pt"
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"state": [1, 2.25]}}, state)
    with pytest.raises(FaultError, match=r"uninterrupted run: decoder/step_00000010$"):
        require_outcome(same, run.outcome())


def test_leftovers_are_told_from_later_ones_of_the_same_name(run):
    folder = run.model / "checkpoints" / ".writing_step_00000010"
    folder.mkdir(parents=True)
    (run.model / ".lock").touch()
    before = run.leftovers()
    assert list(before) == [folder]
    (folder / "state.pt").touch()
    assert run.leftovers().keys() == before.keys()
    assert run.leftovers() != before


def test_a_stage_has_begun_when_it_has_looked_for_checkpoints(run):
    assert run.began("ops run in PyTorch on cpu") == []
    assert run.began(f"resumed from {run.model}/checkpoints/step_00000010\n") == [run.model]
    assert run.began(f"--resume auto: no checkpoint in {run.tokenizer}/checkpoints, starting") == [run.tokenizer]


def test_where_a_kill_landed(run):
    frames = [(match["file"], match["function"]) for match in _FRAME.finditer(STACK)]
    assert _place(frames, []) == "before or after a checkpoint write"
    assert _place(frames[1:], []) == "training step"
    assert _place(frames[1:], [run.model / ".env.json.tmp"]) == "training step"
    assert _place(frames[1:], [run.model / ".model.tmp-x"]) == "artifact write"
    assert _place(frames[1:], [run.model / "checkpoints" / ".writing_step_00000010"]) == IN_A_WRITE
    assert _place([], []) == "start-up and the rest"


def test_an_aimed_kill_waits_for_a_new_write(run):
    class Chance(random.Random):
        def random(self) -> float:
            return 0.0

        def choice(self, seq):
            return 1

    folder = run.model / "checkpoints"
    (folder / ".writing_old").mkdir(parents=True)
    moment = _moment(run, Chance(), Pace(seconds=1000.0, write_seconds=0.0))
    assert not any(islice(moment, 5))
    for name in (".writing_a", ".writing_b"):  # one passes, the next is met
        assert not any(islice(moment, 5))
        (folder / name).mkdir()
        met = next(moment)
        (folder / name).rmdir()
    assert met


def test_tallies_add_up():
    tally = Tally(lives=2, rounds=1, failures=["x"]) + Tally(lives=1)
    assert (tally.lives, tally.rounds, tally.failures, tally.kills) == (3, 1, ["x"], 0)


def test_a_campaign_goes_on_until_a_fifth_of_the_kills_landed_in_writes():
    assert not _enough(Tally(places=Counter({IN_A_WRITE: 9})), 10)
    assert not _enough(Tally(places=Counter({IN_A_WRITE: 1, "training step": 20})), 10)
    assert _enough(Tally(places=Counter({IN_A_WRITE: 2, "training step": 8})), 10)


def test_every_case_has_a_quick_form():
    assert damage_cases(quick=True).keys() == damage_cases(quick=False).keys()


@pytest.mark.slow
def test_a_small_campaign(run, tmp_path):
    """Real lives of the real script: killed, interrupted, damaged."""
    pace = measure_pace(run)
    expected = run.outcome()
    tally = kill_campaign(tmp_path / "kills", run, expected, pace, kills=1, seed="2")
    assert tally.failures == []
    assert tally.kills >= 1
    interrupted = run.anew(tmp_path / "interrupted")
    interrupt(interrupted, signal.SIGTERM)
    trials, seen = flipped_bits(Victim(interrupted, expected, tmp_path, random.Random(0)), flips=1)
    assert (trials, seen) == (1, "1 detected, went on from the one before")
