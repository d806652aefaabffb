"""What every finished training ends in: metrics beside baselines on both held-out roles, tables, plots and a page."""

from collections.abc import Sequence
from typing import Any

from data.processed import DatasetConfig
from evaluation.processes import Processes
from evaluation.ranker import Ranker
from evaluation.table import format_metrics
from reports.plots import plot_run
from reports.runs.report import write_run_report
from tasks.protocol import EvaluationProtocol
from training.loop import TrainingResult
from training.processes import on_main
from training.run_folder import RunFolder

_HELD_OUT = ("valid", "test")


def origin_of(
    run: RunFolder, dataset: DatasetConfig, protocol: EvaluationProtocol, training: TrainingResult | None = None
) -> dict[str, Any]:
    """Where a model comes from, for the manifest of its artifact.

    Args:
        run: that made it.
        dataset: as it was asked for.
        protocol: whose split it was trained on.
        training: how training went; None for rankers that were counted, not trained.
    """
    origin = {
        "dataset": dataset.to_dict(),
        "dataset_manifest_hash": protocol.dataset.manifest_hash,
        "exclude_seen": protocol.exclude_seen,
        "environment": run.environment(),
    }
    return origin if training is None else origin | {"steps": training.steps, "best_step": training.best_step}


def finish(
    run: RunFolder,
    protocol: EvaluationProtocol,
    rankers: Sequence[Ranker],
    processes: Processes,
    *,
    training: TrainingResult | None = None,
) -> None:
    """Evaluate the best weights, once, and write what a person looks at; the only time that test is read.

    Args:
        run: gets metrics.json, ranks_valid.safetensors, ranks_test.safetensors and report/.
        protocol: how to evaluate; its baselines stand beside the rankers unless one of these is such a baseline.
        rankers: with distinct names.
        processes: share the evaluation.
        training: how training went; None for rankers that were counted, not trained.
    """
    names = {ranker.name for ranker in rankers}
    rankers = [*rankers, *(baseline for baseline in protocol.baselines() if baseline.name not in names)]
    metrics: dict[str, float] = {}
    for role in _HELD_OUT:
        ranks_path = run.root / f"ranks_{role}.safetensors"
        metrics |= protocol.evaluate(rankers, role, ranks_path=ranks_path, progress=True, processes=processes)
    course = {}
    if training is not None:
        course = {"best_step": training.best_step, "steps": training.steps, "seconds": training.seconds}
    run.write_metrics(metrics | course)
    on_main(lambda: _report(run, protocol, metrics))


def _report(run: RunFolder, protocol: EvaluationProtocol, metrics: dict[str, float]) -> None:
    """Print the tables and plot what training logged."""
    for role in _HELD_OUT:
        print(f"\n{role}, {protocol.describe()}\n{format_metrics(metrics, split=role)}")
    if run.metrics_log.exists():
        plot_run(run.metrics_log, run.report)
    write_run_report(run.report / "index.html", [run.root])
    print(f"model, metrics and report/index.html: {run.root}")
