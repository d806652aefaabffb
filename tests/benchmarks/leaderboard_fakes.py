"""Training scripts that draw ranks instead of training, and the configs that name them."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from data.processed import DatasetConfig, load_dataset
from evaluation.evaluator import Evaluation, save_ranks
from tests.tiny_dataset import walks, write_interactions

RANKERS = {
    "train_sequence": ["sasrec"],
    "train_decoder": ["generative", "dense", "hybrid@20"],
    "fit_baseline": ["popularity"],
}
BESIDE = ["popularity", "item_knn"]
CHANCES = {"sasrec": 0.5, "generative": 0.3, "dense": 0.4, "hybrid@20": 0.6, "popularity": 0.1, "item_knn": 0.2}
"""How often a ranker's list has the target."""


class FakeScripts:
    """Stands for `run_python`: writes what a script leaves, from ranks drawn by seed.

    Attributes:
        dataset: of every run.
        calls: script and settings of every run that was started.
        environments: of every run that was started.
        failing: models that end with an error.
        stopping: models during which someone presses Ctrl-C.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir()
        write_interactions(root / "log.csv")
        self.dataset: DatasetConfig = walks(root, root / "log.csv")
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.environments: list[dict[str, str]] = []
        self.failing: set[str] = set()
        self.stopping: set[str] = set()

    def __call__(self, arguments, log, environment) -> int:
        script, _, *rest = arguments
        settings = dict(argument.removeprefix("--gin.").split("=", 1) for argument in rest if "=" in argument)
        script = script.removesuffix(".py")
        self.calls.append((script, settings))
        self.environments.append(dict(environment))
        folder = Path(settings[f"{script}.train.save_dir_root"])
        folder.mkdir(parents=True, exist_ok=True)
        if folder.parent.name in self.stopping:
            raise KeyboardInterrupt
        if folder.parent.name in self.failing:
            log.write_text("working\nerror: the disk is full\nbye\n")
            return 2
        self._write(folder, script, int(settings[f"{script}.train.seed"]), settings["DatasetConfig.split"])
        return 0

    def _write(self, folder: Path, script: str, seed: int, split_name: str) -> None:
        prepared = load_dataset(self.dataset)
        split, histories = prepared.split(split_name), prepared.histories
        (folder / "model").mkdir()
        manifest = {
            "dataset": self.dataset.to_dict(),
            "dataset_manifest_hash": prepared.manifest_hash,
            "exclude_seen": True,
        }
        (folder / "model" / "manifest.json").write_text(json.dumps(manifest))
        hardware = {"cuda_devices": [], "cpu": "Abacus", "torch_threads": 1}
        (folder / "env.json").write_text(json.dumps({"commit": "0123456789abcdef+changes", "hardware": hardware}))
        for role in ("valid", "test"):
            ranges = split.role(role)
            ends = histories.offsets.long()[ranges.rows.long()] + ranges.ends.long()
            targets = histories.item_ids[ends].long()
            names = list(dict.fromkeys([*RANKERS[script], *BESIDE]))
            drawn = [Evaluation(name, {}, self._ranks(name, seed, len(ranges)), targets, ranges.rows) for name in names]
            save_ranks(folder / f"ranks_{role}.safetensors", drawn)
        (folder / "metrics.json").write_text(json.dumps({"seconds": 90.0, "steps": 7, "best_step": 5}))

    @staticmethod
    def _ranks(name: str, seed: int, num_users: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + (seed if name not in BESIDE else 0))
        found = torch.rand(num_users, generator=generator) < CHANCES[name]
        return torch.where(found, torch.randint(1, 21, (num_users,), generator=generator), 0).int()


def fake_artifact(folder: Path) -> SimpleNamespace:
    """Stands for `load_model_artifact`: six parameters that are trained, two that are not."""
    model = nn.Linear(2, 3, bias=False)
    model.register_parameter("frozen", nn.Parameter(torch.zeros(2), requires_grad=False))
    return SimpleNamespace(model=model)


def write_configs(folder: Path) -> Path:
    """Configs of four models on the demo; returns the folder of configs."""
    (folder / "demo").mkdir(parents=True)
    tokenizer = 'train_rqvae.train.loop = @rqvae/LoopConfig()\ntrain_rqvae.train.save_dir_root = "runs/demo/rqvae"\n'
    decoder = f"{tokenizer}train_decoder.train.loop = @decoder/LoopConfig()\n"
    texts = {
        "popularity": "fit_baseline.train.dataset = @DatasetConfig()\n",
        "sasrec": "train_sequence.train.loop = @LoopConfig()\nLoopConfig.max_minutes = 7.0\n",
        "decoder": decoder,
        "liger": decoder,
    }
    for name, text in texts.items():
        (folder / "demo" / f"{name}.gin").write_text(text)
    return folder
