import pytest

from training.schedules import schedule_factor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("inverse_sqrt", [0.5, 1.0, 0.816496580927726, 0.7071067811865476, 0.6324555320336759, 0.5773502691896257]),
    ],
)
def test_two_warmup_steps_of_six(name, expected):
    factor = schedule_factor(name, warmup_steps=2, num_steps=6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_without_warmup_the_first_step_has_the_full_rate(name):
    assert schedule_factor(name, warmup_steps=0, num_steps=10)(0) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_never_goes_below_zero_past_the_end(name):
    factor = schedule_factor(name, warmup_steps=0, num_steps=4)
    assert factor(4) == pytest.approx(0.0, abs=1e-15)
    assert factor(9) == pytest.approx(0.0, abs=1e-15)


def test_warmup_longer_than_the_run():
    factor = schedule_factor("cosine", warmup_steps=10, num_steps=4)
    assert [factor(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
