"""How a run went, in words and a few numbers."""

import math
from dataclasses import dataclass

from reports.parts import NOTHING, count
from reports.plots import number
from reports.runs.reading import Run

GOOD, WARN, BAD = "good", "warn", "bad"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run went.

    Attributes:
        status: good, warn or bad.
        state: "finished", "not finished" or "trial".
        reason: a sentence on why it ended where it did.
        step: the last one that is known of.
        num_steps: asked for; None where that is not known.
        selection_metric: its name; None where the folder does not tell.
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
    step = max(int(number(value) or 0) for value in (run.progress.get("step"), last.get("step"), final.get("steps")))
    num_steps = run.loop_setting("num_steps")
    best_step = number(final.get("best_step", run.progress.get("best_step")))
    best = number(run.progress.get("best_metric"))
    name, higher_is_better = _selection(run)
    seconds = number(final.get("seconds", last.get("seconds", run.progress.get("seconds"))))
    skipped, overflowed = (_total(run, f"train/{kind}_steps") for kind in ("skipped", "overflow"))
    not_finite = bool(run.curves) and _last_loss(run) is None
    finished = run.metrics is not None
    return Outcome(
        status=BAD if not_finite and not finished else GOOD if (finished or run.trial) and not skipped else WARN,
        state="finished" if finished else "trial" if run.trial else "not finished",
        reason=_reason(run, step, num_steps, seconds),
        step=step,
        num_steps=None if num_steps is None else int(num_steps),
        selection_metric=name,
        higher_is_better=higher_is_better,
        best_metric=best,
        best_step=None if best_step is None or best is None else int(best_step),
        seconds=seconds,
        skipped=skipped,
        overflowed=overflowed,
        advice=tuple(_advice(run, name, best_step, skipped, not_finite)),
    )


def _reason(run: Run, step: int, num_steps: float | None, seconds: float | None) -> str:
    if run.trial:
        return f"A trial (--{run.trial}) of {count(step, 'step')}, which has no final metrics."
    patience, minutes = run.loop_setting("patience"), run.loop_setting("max_minutes")
    if num_steps is not None and step >= num_steps:
        ended = f"All {count(int(num_steps), 'step')} were done."
    elif patience is not None and (number(run.progress.get("evaluations_without_improvement")) or 0) >= patience:
        ended = f"It stopped because {count(int(patience), 'evaluation')} in a row brought no improvement."
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
    if run.metrics is None and not run.trial:
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
    own = number(scores.get(ranker))
    return [
        f"{other} ranks better than {ranker}: {metric} {score:.4f} against {own:.4f} on test."
        for other, score in scores.items()
        if own is not None and (number(score) or 0.0) > own
    ]


def _selection(run: Run) -> tuple[str | None, bool | None]:
    """Name of the metric that chose the weights, and whether more of it is better, as training has noted them."""
    name, higher = run.environment.get("selection_metric"), run.environment.get("higher_is_better")
    return name if isinstance(name, str) and name in run.curves else None, higher if isinstance(higher, bool) else None


def _last_loss(run: Run) -> float | None:
    """Training loss of the last log; None where it was not finite."""
    logged = [record["train/loss"] for record in run.records if "train/loss" in record]
    return number(logged[-1]) if logged else math.inf


def _total(run: Run, name: str) -> int:
    return round(sum(run.curves[name][1])) if name in run.curves else 0


def duration(seconds: float | None) -> str:
    """2 h 5 min, 3 min 20 s, 41 s."""
    if seconds is None:
        return NOTHING
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
