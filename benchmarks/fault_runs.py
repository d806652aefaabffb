"""The run that the faults happen to: the demo made short, and what there is to say of its folders."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from benchmarks.fault_lives import Life
from training.checkpoint import DamagedCheckpointError, verify

SETTINGS = {
    "rqvae/LoopConfig.num_steps": 60,
    "rqvae/LoopConfig.eval_every": 20,
    "rqvae/LoopConfig.checkpoint_every": 5,
    "train_rqvae.train.pretrain_steps": 20,
    "decoder/LoopConfig.num_steps": 100,
    "decoder/LoopConfig.warmup_steps": 20,
    "decoder/LoopConfig.eval_every": 25,
    "decoder/LoopConfig.checkpoint_every": 5,
    "LoopConfig.log_every": 5,
    "train_decoder.train.batch_size": 32,
    "train_decoder.train.beam_width": 5,
    "train_decoder.train.max_valid_users": 100,
}
QUICK_SETTINGS = SETTINGS | {
    "decoder/LoopConfig.num_steps": 40,
    "decoder/LoopConfig.eval_every": 10,
    "rqvae/LoopConfig.num_steps": 30,
    "RetrievalModelConfig.d_model": 16,
    "RetrievalModelConfig.head_dim": 8,
    "RetrievalModelConfig.d_ff": 32,
    "RetrievalModelConfig.num_encoder_layers": 1,
    "RetrievalModelConfig.num_decoder_layers": 1,
}
_TIMES = ("seconds", "per_second", "time")

Outcome = dict[str, Any]
"""All that a finished run has come to, by name."""

Leftovers = dict[Path, tuple[int, int]]
"""Temporary files and folders, each with what tells it from a later one of the same name."""


class FaultError(Exception):
    """Something happened that training must not do."""


class DemoRun:
    """The folders of one run of the demo: its data, its tokenizer's run, its model's run.

    Args:
        root: holds them; created. What lives print lies beside it, for lives that cannot write there.
        settings: of the config, by name.
    """

    def __init__(self, root: Path, settings: Mapping[str, int]) -> None:
        self.root = root
        self.log = root.with_name(f"{root.name}.log")
        self.data = root / "dataset"
        self.stages = (root / "rqvae", root / "decoder")
        self._settings = settings
        root.mkdir(parents=True, exist_ok=True)

    @property
    def tokenizer(self) -> Path:
        """Run folder of the first stage."""
        return self.stages[0]

    @property
    def model(self) -> Path:
        """Run folder of the second stage."""
        return self.stages[1]

    def live(self, *more: str, file_size_limit: int | None = None) -> Life:
        """Begin the run, or go on with it: `python train_decoder.py configs/demo/decoder.gin --resume auto ...`."""
        return Life(self.arguments(*more), self.log, file_size_limit=file_size_limit)

    def arguments(self, *more: str) -> list[str]:
        """Of train_decoder.py."""
        settings = {
            **self._settings,
            "DatasetConfig.root": self.data,
            "train_rqvae.train.save_dir_root": self.tokenizer,
            "train_decoder.train.save_dir_root": self.model,
        }
        return [
            "configs/demo/decoder.gin",
            *("--resume", "auto"),
            *(f"--gin.{name}={value}" for name, value in settings.items()),
            *more,
        ]

    def anew(self, root: Path) -> "DemoRun":
        """Another run of the same settings, not begun."""
        return DemoRun(root, self._settings)

    def copy(self, root: Path) -> "DemoRun":
        """The same run in another place, links among its files kept: damage to one name is damage to all."""
        made = self.anew(root)
        subprocess.run(["cp", "--archive", f"{self.root}/.", str(root)], check=True)
        return made

    def remove(self) -> None:
        """Remove all folders."""
        shutil.rmtree(self.root)

    def began(self, printed: str) -> list[Path]:
        """Folders that, by what a life has printed, it has opened and looked through for a checkpoint."""
        lines = [line for line in printed.splitlines() if "resumed from" in line or "no checkpoint in" in line]
        return [stage for stage in self.stages if any(f"{stage}/" in line for line in lines)]

    def checkpoints(self) -> list[Path]:
        """Those of the model, newest first."""
        return sorted((self.model / "checkpoints").glob("step_*"), reverse=True)

    def damaged(self) -> list[str]:
        """What is wrong with the checkpoints of either stage that bear a final name."""
        problems = []
        for path in sorted(path for stage in self.stages for path in stage.glob("checkpoints/step_*")):
            try:
                verify(path)
            except DamagedCheckpointError as error:
                problems.append(f"{path.relative_to(self.root)}: {error}")
        return problems

    def leftovers(self) -> Leftovers:
        """Temporary files and folders; locks, which hold nothing, are none."""
        found = {}
        for folder, folders, files in os.walk(self.root):  # which takes it well that folders vanish meanwhile
            for name in (*folders, *files):
                if name.startswith(".") and not name.endswith(".lock"):
                    with suppress(FileNotFoundError):
                        status = os.stat(os.path.join(folder, name))
                        found[Path(folder, name)] = (status.st_ino, status.st_ctime_ns)
        return found

    def names(self, paths: Iterable[Path]) -> str:
        """Paths as seen from the root."""
        return ", ".join(str(path.relative_to(self.root)) for path in paths)

    def outcome(self) -> Outcome:
        """All that a finished run has come to, without times: metrics, logs, ranks, weights, ids, training state."""
        found: Outcome = {}
        for stage in self.stages:
            name = stage.name
            found[f"{name}/metrics.json"] = _without_times(json.loads((stage / "metrics.json").read_text()))
            log = (stage / "metrics.jsonl").read_text().splitlines()
            found[f"{name}/metrics.jsonl"] = [_without_times(json.loads(line)) for line in log]
            last = max(stage.glob("checkpoints/step_*"))
            found[f"{name}/{last.name}"] = _training_state(last / "state.pt")
            files = [
                *stage.glob("model/**/*.safetensors"),
                *stage.glob("*.safetensors"),
                *stage.glob("checkpoints/*.s*"),
            ]
            found |= {str(path.relative_to(self.root)): _tensors_of(path) for path in files}
        return found


def finish(run: DemoRun, expected: Outcome | None = None, *more: str) -> str:
    """Let a run go to its end; returns what the life printed.

    Args:
        run: begun or not.
        expected: outcome that it must have.
        more: arguments.

    Raises:
        FaultError: if it fails or comes to something else.
        TimeoutError: if it hangs.
    """
    life = run.live(*more)
    require_success(life)
    if expected is not None:
        require_outcome(run, expected)
    return life.printed()


def require_success(life: Life) -> None:
    """FaultError if a life does not end with exit code 0."""
    code = life.end()
    if code != 0:
        raise FaultError(f"exit code {code}: {life.last_words()}")


def require_outcome(run: DemoRun, expected: Outcome) -> None:
    """FaultError if a finished run has come to anything else."""
    outcome = run.outcome()
    differing = sorted(name for name in outcome.keys() | expected.keys() if outcome.get(name) != expected.get(name))
    if differing:
        raise FaultError(f"other than the uninterrupted run: {', '.join(differing)}")


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not any(part in key for part in _TIMES)}


def _training_state(path: Path) -> str:
    """Digest of the model's and the optimizer's state."""
    state = torch.load(path, weights_only=True)
    return hashlib.sha256(_as_bytes([state["model"], state["optimizer"]])).hexdigest()


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{value.shape}".encode() + value.numpy().tobytes()
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _as_bytes(value[key]) for key in value)
    return b"".join(map(_as_bytes, value)) if isinstance(value, list | tuple) else repr(value).encode()


def _tensors_of(path: Path) -> dict[str, tuple[str, Sequence[int], str]]:
    """Type, shape and digest of every tensor: the file itself may hold them in any order."""
    return {
        name: (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in load_file(path).items()
    }
