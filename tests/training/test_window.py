import math
from types import SimpleNamespace

import pytest
import torch

from training.step import StepSums
from training.window import Window

NAMES = ("loss/loss", "norm", "skipped")
GOOD, SKIPPED, OVERFLOWED = (6.0, 2.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)


def window(*, scaled: bool = True, other_process: float = 1.0) -> Window:
    """Of one process, or of two, the other of which has so many times the sums of this one."""
    accelerator = SimpleNamespace(
        scaler=object() if scaled else None,
        device=torch.device("cpu"),
        num_processes=1,
        reduce=lambda sums, reduction: sums * (1 + other_process) / 2,
    )
    return Window(accelerator)


def add(to: Window, *steps: tuple[float, ...], names: tuple[str, ...] = (*NAMES, "overflow")) -> None:
    for values in steps:
        to.add(StepSums(names, torch.tensor(values), 3, 30))


def read(of: Window) -> dict[str, float]:
    values = of.read()
    assert values.pop("train/examples_per_second") > 0
    return values


def test_means_are_over_the_steps_that_counted():
    logged = window()
    add(logged, GOOD, SKIPPED, OVERFLOWED, SKIPPED, (12.0, 4.0, 0.0, 0.0))
    assert read(logged) == {
        "train/loss": 3.0,  # (6 + 12) over two steps of three batches
        "train/gradient_norm": 3.0,
        "train/skipped_steps": 2,
        "train/overflow_steps": 1,
    }
    assert logged.num_steps == 5


def test_a_window_of_skipped_steps_has_no_mean():
    logged = window()
    add(logged, SKIPPED, OVERFLOWED)
    values = read(logged)
    assert math.isnan(values["train/loss"])
    assert math.isnan(values["train/gradient_norm"])
    assert (values["train/skipped_steps"], values["train/overflow_steps"]) == (1, 1)


def test_overflow_is_not_named_without_loss_scaling():
    logged = window(scaled=False)
    add(logged, (6.0, 2.0, 0.0), (0.0, 0.0, 1.0), names=NAMES)
    assert read(logged) == {"train/loss": 2.0, "train/gradient_norm": 2.0, "train/skipped_steps": 1}


def test_a_saved_window_continues():
    whole, cut, resumed = window(), window(), window()
    add(whole, GOOD, SKIPPED, GOOD)
    add(cut, GOOD, SKIPPED)
    resumed.load_state_dict(cut.state_dict())
    add(resumed, GOOD)
    assert read(resumed) == read(whole)
    add(cut, SKIPPED)  # what was saved is a copy
    assert resumed.num_steps == 3


def test_a_saved_window_holds_the_means_of_all_processes():
    """Only the main one's is kept, and every process continues it."""
    saved, resumed = window(other_process=3.0), window()
    add(saved, GOOD)
    resumed.load_state_dict(saved.state_dict())
    add(resumed, GOOD)
    assert read(resumed)["train/loss"] == 3.0  # 6 and 18 of the two processes, then 6 of each, over six batches
    assert window(other_process=3.0).state_dict()["sums"] == {}


def test_a_window_saved_before_steps_could_be_skipped_continues():
    logged = window()
    sums = {"loss/loss": torch.tensor(6.0), "overflow": torch.tensor(0.0), "norm": torch.tensor(2.0)}
    logged.load_state_dict({"sums": sums, "batches": 3, "steps": 1, "examples": 30})
    add(logged, GOOD)
    assert read(logged)["train/loss"] == pytest.approx(2.0)
