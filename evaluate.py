"""Evaluate a trained model beside baselines, item by item over the full catalogue.

    python evaluate.py runs/demo                                  # test split, with popularity and ItemKNN
    python evaluate.py runs/beauty --split valid --json valid.json
    python evaluate.py runs/liger --mode generative dense hybrid@20 hybrid@100 --beam-width 100    # one table
    python evaluate.py runs/beauty --ranks ranks.safetensors      # per-user ranks, to compare models pairwise
    torchrun --nproc_per_node 4 evaluate.py runs/beauty           # shared by 4 processes, the same numbers

The prepared dataset that the model was trained on is looked for in --dataset-root and prepared again where it is
missing; a prepared dataset of other content is refused, and stays as it is. The JSON file holds
`{ranker}/{split}/{slice}/{metric}` -> value, and under "about" how it came about.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported where it is used, so that --help is quick
    import torch

    from data.processed import DatasetConfig, PreparedDataset
    from modules.artifact import ModelArtifact


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_script(parse_arguments, evaluate, argv)


def evaluate(args: argparse.Namespace) -> int:
    """Load, rank, print and write; returns the exit code."""
    from evaluation.table import format_metrics
    from modules.artifact import load_model_artifact
    from tasks.protocol import EvaluationProtocol, run_processes
    from training.processes import leave_together, process_state

    for option, path in (("--json", args.json), ("--ranks", args.ranks)):
        check_writable(path, option)
    processes = run_processes()
    artifact = load_model_artifact(args.artifact, device=usable_device(args.device or str(process_state().device)))
    check_catalogue_unchanged(artifact)
    rankers = artifact.make_rankers(args.mode, beam_width=args.beam_width, batch_size=args.batch_size)
    config = dataset_config(artifact.manifest, root=args.dataset_root, raw_dir=args.raw_dir)
    dataset = matching_dataset(config, artifact.manifest)
    exclude_seen = artifact.manifest.get("exclude_seen") if args.exclude_seen is None else args.exclude_seen
    protocol = EvaluationProtocol.of(
        dataset, config.split, max_history=rankers[0].max_history, exclude_seen=exclude_seen
    )
    names = [ranker.name for ranker in rankers]
    baselines = [ranker for ranker in protocol.baselines() if ranker.name not in names] if args.baselines else []
    metrics = protocol.evaluate(
        [*rankers, *baselines],
        args.split,
        batch_size=args.batch_size,
        ranks_path=args.ranks,
        progress=True,
        processes=processes,
    )
    if processes.is_main:
        print(f"{args.split}, {protocol.describe()}\n{format_metrics(metrics, split=args.split)}")
    if args.json is not None:
        about = {
            "dataset": dataset.name,
            "split": config.split,
            "num_items": len(protocol.cold),
            "exclude_seen": protocol.exclude_seen,
            "max_history": protocol.max_history,
            "beam_width": next((ranker.beam_width for ranker in rankers if hasattr(ranker, "beam_width")), None),
            "system": artifact.system,
            "rankers": names,
        }
        processes.on_main(lambda: write_json(args.json, {"about": about, **metrics}))
    leave_together()
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace; exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate a trained model beside baselines over the full catalogue."
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument("artifact", metavar="RUN_OR_ARTIFACT", help="run folder, model artifact or Hub id")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="which users' targets (test)")
    parser.add_argument(
        "--mode",
        nargs="+",
        default=[],
        metavar="M",
        help="generative, dense, hybrid@20, hybrid@100, hybrid@all, ..., in one table (the artifact's own)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics here")
    parser.add_argument("--ranks", type=Path, metavar="FILE", help="write every user's rank here, as safetensors")
    parser.add_argument("--baselines", action=switch, default=True, help="popularity and ItemKNN as well (yes)")
    parser.add_argument(
        "--exclude-seen",
        action=switch,
        help="take the items of the history out, for every ranker (as in training)",
    )
    parser.add_argument("--dataset-root", metavar="DIR", help="folder of the prepared datasets (as in training)")
    parser.add_argument("--raw-dir", metavar="DIR", help="local raw files, where the dataset is not prepared yet")
    parser.add_argument("--batch-size", type=positive_int, default=256, metavar="B", help="histories at once (256)")
    parser.add_argument("--beam-width", type=positive_int, metavar="W", help="beams per history (the artifact's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one, each process its own)")
    return parser.parse_args(argv)


def run_script(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str],
) -> int:
    """Parse the arguments and run the command; torch is imported in between, so that --help is quick."""
    try:
        args = parse(argv)
    except SystemExit as leaving:  # argparse has printed its help or message
        return leaving.code if isinstance(leaving.code, int) else 2
    try:
        from training.cli import run_cli
    except KeyboardInterrupt:  # importing torch takes seconds
        print("interrupted", file=sys.stderr)
        return 130
    return run_cli(lambda _: command(args), argv)


def positive_int(text: str) -> int:
    """An argument that must be a whole number above zero."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def usable_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one; InputError where torch cannot use it."""
    import torch

    from data.schemas import InputError

    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--device {name} cannot be used: {reason}. Try --device cpu.") from error


def check_catalogue_unchanged(artifact: ModelArtifact) -> None:
    """InputError where items were added or removed since training: the data set has neither."""
    from data.schemas import InputError

    if artifact.catalogue_version > 1:
        raise InputError(
            f"the artifact's catalogue was changed after training (version {artifact.catalogue_version}, "
            f"{len(artifact.catalogue)} items), so its lists cannot be compared on the data set that it was trained "
            "on. Evaluate the artifact as training wrote it."
        )


def dataset_config(manifest: dict[str, Any], *, root: str | None, raw_dir: str | None) -> DatasetConfig:
    """What a model's manifest says of its dataset, with the folders that the command line gives instead.

    Raises:
        InputError: if the manifest has no usable description of a dataset.
    """
    from data.processed import DatasetConfig
    from data.schemas import InputError

    fields = manifest.get("dataset")
    if not isinstance(fields, dict) or "dataset" not in fields:
        raise InputError(
            "the artifact's manifest.json does not say on which dataset the model was trained (key 'dataset'); "
            "evaluate.py needs an artifact that train_decoder.py, train_sequence.py or fit_baseline.py wrote."
        )
    config = DatasetConfig.from_dict(fields)
    return replace(config, root=root or config.root, raw_dir=raw_dir or config.raw_dir)


def matching_dataset(config: DatasetConfig, manifest: dict[str, Any]) -> PreparedDataset:
    """The prepared dataset, which must be the one that the model was trained on.

    What is prepared already is used whatever its raw files look like by now: preparing them again could replace the
    only copy of what the model knows.

    Raises:
        InputError: if it holds other items or histories: item ids would mean other items.
    """
    from data.processed import find_prepared, load_dataset
    from data.schemas import InputError

    dataset = find_prepared(config) or load_dataset(config)
    expected = manifest.get("dataset_manifest_hash")
    if dataset.manifest_hash != expected:
        raise InputError(
            f"{dataset.folder} is not the dataset that the model was trained on: expected manifest hash {expected}, "
            f"got {dataset.manifest_hash}. Give the right folder with --dataset-root (a new folder to prepare it "
            "again, with --raw-dir), or train again on this data."
        )
    return dataset


def check_writable(path: Path | None, option: str) -> None:
    """InputError when a file cannot be written there; said before the work whose result it shall hold."""
    from data.schemas import InputError

    if path is None:
        return
    place = next(folder for folder in path.absolute().parents if folder.exists())
    problem = None
    if path.is_dir():
        problem = "it is a folder"
    elif not place.is_dir():
        problem = f"{place} is not a folder"
    elif not os.access(place, os.W_OK):
        problem = f"{place} is not writable"
    if problem:
        raise InputError(f"cannot write {path}: {problem}. Choose another {option}.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears under its name only when it is whole."""
    from data.files import disk_problem, replace_file
    from data.schemas import InputError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        reason = disk_problem(error) or error.strerror
        raise InputError(f"cannot write {path}: {reason}. Choose another --json.") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
