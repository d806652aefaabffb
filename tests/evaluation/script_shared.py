"""One of several processes that evaluate together; a test of evaluate.py starts it under torchrun.

    torchrun -m tests.evaluation.script_shared OUTPUT RUN [options of evaluate.py]

RUN is the folder of `tests/test_evaluate_cli.py`. What this process saw goes to OUTPUT/{process_index}.json; then
evaluate.py's own main runs.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate
import tasks.rqvae
from data.processed import load_dataset
from data.schemas import InputError, ItemFilter, SeqBatch
from evaluation.processes import Processes
from modules.estimators import QuantizeMode
from modules.rqvae import RqVae, RqVaeConfig
from modules.top_items import top_items
from tasks.protocol import EvaluationProtocol
from tests.tiny_dataset import NUM_ITEMS, walks
from tests.training.tasks import tokenizer_settings
from training.processes import process_state


@dataclass
class LowIdsFirst:
    """Notes how many rows it was given; in the process named here it fails instead."""

    fails_in: int | None = None
    name: str = "low_ids"
    rows: list[int] = field(default_factory=list)

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        if self.fails_in == process_state().process_index:
            raise InputError(f"process {self.fails_in} has no luck")
        self.rows.append(len(histories))
        return top_items(-torch.arange(float(NUM_ITEMS)).expand(len(histories), -1), k)


class CountingRqVae(RqVae):
    """Notes how many rows it was given."""

    def forward(self, x, **options):
        self.rows = [*getattr(self, "rows", []), len(x)]
        return super().forward(x, **options)


def ranked(run: Path, processes: Processes, output: Path) -> dict:
    """Five batches of users, then a single user, then errors of a ranker and of the file for the ranks."""
    protocol = EvaluationProtocol.of(
        load_dataset(walks(run / "dataset", run / "log.csv")), "leave_one_out", max_history=3
    )
    told: dict = {}
    for name, options in {
        "shared": {"processes": processes},
        "alone": {},
        "one_user": {"processes": processes, "max_users": 1},
    }.items():
        ranker = LowIdsFirst()
        metrics = protocol.evaluate([ranker], "test", batch_size=9, **options)
        told[name] = {"metrics": metrics, "rows": ranker.rows}
    try:
        protocol.evaluate([LowIdsFirst(fails_in=1)], "test", batch_size=9, processes=processes)
    except InputError as error:
        told["error"] = str(error)
    try:
        broken = output / "0.json" / "ranks.safetensors"  # a file's place is no folder
        (output / "0.json").touch()
        protocol.evaluate([LowIdsFirst()], "test", batch_size=9, processes=processes, ranks_path=broken)
    except InputError as error:
        told["unwritable"] = str(error)
    return told


def quantized() -> dict:
    """An RQ-VAE's losses and codebook health, of three blocks; losses of a part of the items."""
    tasks.rqvae._EVALUATION_ROWS = 16
    features = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    torch.manual_seed(0)
    mode = QuantizeMode.GUMBEL_SOFTMAX
    model = CountingRqVae(RqVaeConfig(input_dim=8, hidden_dims=(8,), embed_dim=4, codebook_sizes=(6, 6), mode=mode))
    model.eval()

    def measured() -> dict:
        model.rows = []
        task = tasks.rqvae.RqVaeTask(
            model,
            features,
            np.arange(40),
            np.arange(0, 40, 2),
            item_keys=[str(row) for row in range(40)],
            settings=tokenizer_settings(),
            num_batches=1,
        )
        with torch.no_grad():
            return {"metrics": task.evaluate(model), "rows": model.rows}

    told = {"shared": measured()}
    with pytest.MonkeyPatch.context() as patch:
        alone = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
        patch.setattr(tasks.rqvae, "process_state", lambda: alone)
        told["alone"] = measured()
        tasks.rqvae._EVALUATION_ROWS = 40
        told["alone_in_one_block"] = measured()
    return told


if __name__ == "__main__":
    output, run, *options = sys.argv[1:]
    state = process_state()
    processes = Processes(state.process_index, state.num_processes)
    told = {"ranked": ranked(Path(run), processes, Path(output)), "quantized": quantized()}
    (Path(output) / f"{state.process_index}.json").write_text(json.dumps(told))
    sys.exit(evaluate.main([run, *options]))
