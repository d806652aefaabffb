"""`assign` in a process of its own that starts fast: a server has imported what is slow to import, and forks."""

import multiprocessing
import sys
from pathlib import Path

import torch

from data.feature_files import open_features
from data.schemas import InputError
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from serving.assignment import assign
from serving.processes import LostProcessError

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.serving.assign_process", "polars"])


def start(artifact, features, output, *, rank=0, num_processes=1, rows_per_shard=200):
    """A started process; it ends with 0, with 2 after an InputError, with 1 where another process was lost."""
    arguments = (artifact, features, output, rank, num_processes, rows_per_shard)
    process = CONTEXT.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(artifact, features, output, rank, num_processes, rows_per_shard):
    torch.set_num_threads(1)
    try:
        assign(
            SemanticIdTokenizer.from_pretrained(artifact),
            open_features(Path(features)),
            Path(output),
            rows_per_shard=rows_per_shard,
            process_index=rank,
            num_processes=num_processes,
        )
    except (InputError, LostProcessError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
