"""Where a training stands: the numbers that progress.json keeps, and the clock."""

import time
from dataclasses import dataclass


@dataclass
class TrainingState:
    """Steps done, and the best evaluation so far."""

    step: int = 0
    evaluated_step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluations_without_improvement: int = 0
    seconds: float = 0.0

    @property
    def position(self) -> tuple[int, int]:
        """What changes whenever there is something new to save."""
        return self.step, self.evaluated_step

    def improves(self, metric: float, *, higher_is_better: bool) -> bool:
        """Whether an evaluation is better than all before it."""
        sign = 1 if higher_is_better else -1
        return self.best_metric is None or sign * metric > sign * self.best_metric

    def take_evaluation(self, metric: float, *, improved: bool) -> None:
        """The model was evaluated at the present step."""
        if improved:
            self.best_metric, self.best_step = metric, self.step
        self.evaluations_without_improvement = 0 if improved else self.evaluations_without_improvement + 1
        self.evaluated_step = self.step


class Clock:
    """Training time, that of earlier parts of a resumed run included.

    Args:
        state: where this process begins.
    """

    def __init__(self, state: TrainingState) -> None:
        self._step, self._seconds, self._started = state.step, state.seconds, time.perf_counter()

    def seconds(self) -> float:
        """So far."""
        return self._seconds + time.perf_counter() - self._started

    def seconds_left(self, step: int, *, num_steps: int, max_minutes: float | None) -> float:
        """Estimated from the steps of this process until `num_steps` or the budget of minutes is reached."""
        per_step = (time.perf_counter() - self._started) / max(step - self._step, 1)
        left = per_step * (num_steps - step)
        return left if max_minutes is None else max(min(left, 60 * max_minutes - self.seconds()), 0.0)
