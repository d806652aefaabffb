"""How a run went, in words and a few numbers."""

import math
from dataclasses import dataclass
from typing import Any

from reports.parts import NOTHING, count
from reports.runs.reading import Run

GOOD, WARN, BAD = "good", "warn", "bad"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run went.

    Attributes:
        status: good, warn or bad.
        state: "finished" and the like.
        reason: a sentence on why it ended where it did.
        step: the last one that is known of.
        num_steps: asked for; None where that is not known.
        selection_metric: its name; None where the log does not tell.
        higher_is_better: None where that cannot be told.
        best_metric, best_step: of the weights that were kept; None before the first evaluation.
        seconds: training time.
        skipped: steps whose loss or gradient was not finite.
        overflowed: steps whose gradients overflowed in fp16.
        advice: what a person may want to do.
    """

    status: str
    state: str
    reason: str
    step: int
    num_steps: int | None
    selection_metric: str | None
    higher_is_better: bool | None
    best_metric: float | None
    best_step: int | None
    seconds: float | None
    skipped: int
    overflowed: int
    advice: tuple[str, ...]


def outcome_of(run: Run) -> Outcome:
    """Judge a run by what its folder holds."""
    final = run.metrics or {}
    last = run.records[-1] if run.records else {}
    step = max(int(_number(value) or 0) for value in (run.progress.get("step"), last.get("step"), final.get("steps")))
    num_steps = run.loop_setting("num_steps")
    best_step = _number(final.get("best_step", run.progress.get("best_step")))
    name, best = _selection(run, best_step)
    seconds = _number(final.get("seconds", last.get("seconds", run.progress.get("seconds"))))
    skipped, overflowed = (_total(run, f"train/{kind}_steps") for kind in ("skipped", "overflow"))
    not_finite = bool(run.curves) and _last_loss(run) is None
    finished = run.metrics is not None
    return Outcome(
        status=BAD if not_finite and not finished else GOOD if finished and not skipped else WARN,
        state="finished" if finished else "not finished",
        reason=_reason(run, step, num_steps, seconds),
        step=step,
        num_steps=num_steps,
        selection_metric=name,
        higher_is_better=_direction(run, name, best),
        best_metric=best,
        best_step=None if best_step is None or best is None else int(best_step),
        seconds=seconds,
        skipped=skipped,
        overflowed=overflowed,
        advice=tuple(_advice(run, name, best_step, skipped, not_finite)),
    )


def _reason(run: Run, step: int, num_steps: int | None, seconds: float | None) -> str:
    patience, minutes = run.loop_setting("patience"), run.loop_setting("max_minutes")
    if num_steps is not None and step >= num_steps:
        ended = f"All {count(num_steps, 'step')} were done."
    elif patience is not None and (_number(run.progress.get("evaluations_without_improvement")) or 0) >= patience:
        ended = f"It stopped because {count(patience, 'evaluation')} in a row brought no improvement."
    elif minutes is not None and (seconds or 0) >= 60 * minutes:
        ended = f"It stopped because its time was over (max_minutes = {minutes:g})."
    elif run.metrics is not None and step == 0:
        return "It took no training steps."
    elif run.metrics is not None:
        return f"It ended at step {step:,}; the folder does not say why."
    else:
        return f"Step {step:,} is the last that was logged: it was interrupted, or is still training."
    return ended if run.metrics is not None else f"{ended} The final metrics are missing: it ended before, or is at it."


def _advice(run: Run, metric: str | None, best_step: float | None, skipped: int, not_finite: bool) -> list[str]:
    advice = []
    if run.metrics is None:
        advice.append("Start the same command with --resume auto to go on from the newest checkpoint.")
    if not_finite or skipped:
        advice.append(
            "Losses or gradients were not finite. Lower LoopConfig.learning_rate, raise LoopConfig.warmup_steps, or "
            'set LoopConfig.mixed_precision = "no".'
        )
    evaluated = run.curves[metric][0] if metric else []
    if run.metrics is not None and len(evaluated) > 2 and best_step == evaluated[-1]:
        advice.append("The last evaluation was the best: more steps may help.")
    advice += _rankers_ahead(run, metric)
    if run.unreadable:
        advice.append(f"Missing or damaged: {', '.join(run.unreadable)}; what they say is left out of this page.")
    return advice


def _rankers_ahead(run: Run, selection_metric: str | None) -> list[str]:
    """Baselines that rank the test split better than the model that was trained."""
    if selection_metric is None:
        return []
    ranker, *_, metric = selection_metric.split("/")
    place = f"/test/all/{metric}"
    scores = {key.removesuffix(place): value for key, value in (run.metrics or {}).items() if key.endswith(place)}
    own = _number(scores.get(ranker))
    return [
        f"{other} ranks better than {ranker}: {metric} {score:.4f} against {own:.4f} on test."
        for other, score in scores.items()
        if own is not None and score > own
    ]


def _selection(run: Run, best_step: float | None) -> tuple[str | None, float | None]:
    """Name and value of the metric that chose the weights: the one that had the best value at the best step."""
    best = _number(run.progress.get("best_metric"))
    if best is None:
        return None, None
    for record in run.records:
        if record["step"] == best_step:
            for name, value in record.items():
                if name in run.curves and value == best:
                    return name, best
    return None, best


def _direction(run: Run, name: str | None, best: float | None) -> bool | None:
    """Whether more of a metric is better: the best of its values is the highest, or the lowest."""
    values = run.curves[name][1] if name else []
    if best is None or len(set(values)) < 2:
        return None
    return best == max(values)


def _last_loss(run: Run) -> float | None:
    """Training loss of the last log; None where it was not finite."""
    logged = [record["train/loss"] for record in run.records if "train/loss" in record]
    return _number(logged[-1]) if logged else math.inf


def _total(run: Run, name: str) -> int:
    return round(sum(run.curves[name][1])) if name in run.curves else 0


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def duration(seconds: float | None) -> str:
    """2 h 5 min, 3 min 20 s, 41 s."""
    if seconds is None:
        return NOTHING
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
