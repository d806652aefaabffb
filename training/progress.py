"""What a person watching the training sees on stderr: a bar on a terminal, one line per log elsewhere."""

import sys
from contextlib import ExitStack

from tqdm import tqdm

from training.above_bar import lines_above_bars


class Progress:
    """Progress of one training run.

    Args:
        num_steps: steps in all.
        bar: True or False to force a bar or lines; None for a bar on a terminal only.
        enabled: False keeps silent, as every process but the main one must.
    """

    def __init__(self, *, num_steps: int, bar: bool | None, enabled: bool) -> None:
        self._enabled = enabled
        self._num_steps = num_steps
        self._use_bar = enabled and (sys.stderr.isatty() if bar is None else bar)
        self._bar: tqdm | None = None
        self._shown = ExitStack()

    def start(self, step: int) -> None:
        """Steps begin after this one."""
        if self._use_bar:
            self._shown.enter_context(lines_above_bars())
            self._bar = tqdm(total=self._num_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, *, loss: float, learning_rate: float, examples_per_second: float, left: float) -> None:
        """Show the state at a log step; `left` is the estimated time to the end in seconds."""
        facts = {
            "loss": f"{loss:.4g}",
            "lr": f"{learning_rate:.2e}",
            "examples/s": f"{examples_per_second:,.0f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
        elif self._enabled:
            numbers = "  ".join(f"{name} {value}" for name, value in facts.items())
            self.say(f"step {step}/{self._num_steps}  {numbers}  {tqdm.format_interval(left)} left")

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._enabled:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._shown.close()
