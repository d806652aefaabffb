"""What the leaderboard can train: which script makes a model, and which config for which data set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from data.schemas import InputError
from training.gin_syntax import ConfigReader, Reference, Statement

COUNTED, SEQUENCE, RETRIEVAL = "counted", "sequence", "retrieval"
BASELINES = (COUNTED, SEQUENCE)
"""Kinds that a retrieval model is compared with."""

TOKENIZER = "train_rqvae"
_QUICK_LOOP = {"num_steps": 20, "warmup_steps": 5, "eval_every": 10, "checkpoint_every": 10, "log_every": 5}


@dataclass(frozen=True)
class Model:
    """How a model comes about.

    Attributes:
        script: module name of the script that trains or fits it.
        kind: COUNTED, SEQUENCE or RETRIEVAL.
        seeded: whether its seed matters; else it is run with the first seed alone.
        stores: what it keeps instead of trainable parameters.
        reads_features: whether it, or its tokenizer, stands on text features.
        demo: name of its config in configs/demo/, where that is another than the model's.
    """

    script: str
    kind: str
    seeded: bool = True
    stores: str = ""
    reads_features: bool = False
    demo: str | None = None


_DECODER = Model("train_decoder", RETRIEVAL, reads_features=True)

MODELS: dict[str, Model] = {
    "popularity": Model("fit_baseline", COUNTED, seeded=False, stores="a count per item"),
    "random": Model("fit_baseline", COUNTED, stores="nothing"),
    "item_knn": Model("fit_baseline", COUNTED, seeded=False, stores="neighbours of every item"),
    "user_knn": Model("fit_baseline", COUNTED, seeded=False, stores="the training histories"),
    "sasrec": Model("train_sequence", SEQUENCE),
    "hstu": Model("train_sequence", SEQUENCE),
    "tiger": Model("train_decoder", RETRIEVAL, reads_features=True, demo="decoder"),
    "tiger_text": _DECODER,
    "liger": _DECODER,
    "liger_dense": _DECODER,
}

DATASETS = {"beauty": "beauty", "sports": "sports", "toys": "toys", "steam": "steam", "ml-1m": "ml_1m", "demo": "demo"}
"""Names on the command line, and in the names of configs."""


def find_configs(
    models: Iterable[str], dataset: str, features: str | None, *, configs: Path = REPOSITORY / "configs"
) -> dict[str, Path]:
    """Config of every model.

    Args:
        models: names in MODELS.
        dataset: name in DATASETS.
        features: text features other than the data set's usual ones, such as "minilm", which the names of configs end
            in; models that read none have one config for all.
        configs: folder to look in.

    Raises:
        InputError: if some are missing; the message names them all, and what there is.
    """
    wanted = {name: _config(name, dataset, features, configs) for name in models}
    missing = [path for path in wanted.values() if not path.is_file()]
    if missing:
        there = [
            name
            if path == _config(name, dataset, None, configs)
            else f"{name} with --features {path.stem.split('_')[-1]}"
            for name in MODELS
            for path in _all_configs(name, dataset, configs)
        ]
        raise InputError(
            f"--models: no config for {', '.join(path.relative_to(configs.parent).as_posix() for path in missing)}. "
            f"On {dataset} there are: {', '.join(there) or 'none'}."
        )
    return wanted


def _config(name: str, dataset: str, features: str | None, configs: Path) -> Path:
    if dataset == "demo":
        return configs / "demo" / f"{MODELS[name].demo or name}.gin"
    ending = f"_{features}" if features and MODELS[name].reads_features else ""
    return configs / f"{name}_{DATASETS[dataset]}{ending}.gin"


def _all_configs(name: str, dataset: str, configs: Path) -> list[Path]:
    """Every config of a model on a data set, whatever the features."""
    usual = _config(name, dataset, None, configs)
    others = sorted(usual.parent.glob(f"{usual.stem}_*.gin")) if dataset != "demo" else []
    return [*([usual] if usual.is_file() else []), *others]


@dataclass(frozen=True)
class Config:
    """What the leaderboard has to know of a config before it overrides parts of it.

    Attributes:
        path: of the file.
        values: what it and all that it includes set, by name, as text; comments do not count.
        loop: scope of the settings of the script's training loop, such as "decoder"; None of what is not trained.
        tokenizer_loop: the same of its tokenizer; None without one.
        tokenizer: where the config puts its tokenizer's run; configs that name the same place share a tokenizer.
        max_minutes: training time that the config itself allows; None is unlimited.
    """

    path: Path
    values: Mapping[str, str]
    loop: str | None
    tokenizer_loop: str | None
    tokenizer: str | None
    max_minutes: float | None

    @classmethod
    def read(cls, path: Path, script: str) -> "Config":
        """Read a config of a script."""
        reader = ConfigReader()
        reader.read_file(path)
        values = {
            (
                f"{script}.train" if statement.selector == "train" else statement.selector,
                statement.parameter,
            ): statement.value
            for statement in reader.statements
        }
        loop, tokenizer_loop = (_scope(values.get((f"{stage}.train", "loop"))) for stage in (script, TOKENIZER))
        folder = values.get((f"{TOKENIZER}.train", "save_dir_root")) if tokenizer_loop is not None else None
        budgets = {statement.scope: statement.value for statement in reader.statements if _is_budget(statement)}
        max_minutes = None if loop is None else budgets.get(loop, budgets.get(""))
        written = {statement.name: repr(statement.value) for statement in reader.statements}
        return cls(path, written, loop, tokenizer_loop, str(folder) if folder else None, max_minutes)


def _scope(loop: Any) -> str | None:
    """Scope of a reference such as @decoder/LoopConfig(), "" without one; None of anything else."""
    return "/".join(loop.scopes) if isinstance(loop, Reference) else None


def _is_budget(statement: Statement) -> bool:
    return (statement.selector, statement.parameter) == ("LoopConfig", "max_minutes")


def quick_settings(config: Config, model: Model) -> dict[str, Any]:
    """Overrides with which a model runs in seconds, to see that everything works together."""
    settings: dict[str, Any] = {}
    for scope in (config.loop, config.tokenizer_loop):
        if scope is not None:
            settings |= {_of_loop(scope, name): value for name, value in _QUICK_LOOP.items()}
    if config.tokenizer_loop is not None:
        settings[f"{TOKENIZER}.train.pretrain_steps"] = 20
    if config.loop is not None:
        settings |= {f"{model.script}.train.batch_size": 32, f"{model.script}.train.max_valid_users": 100}
    return settings


def budget_setting(config: Config, minutes: float | None) -> dict[str, Any]:
    """Override for the time that training may take."""
    return {} if minutes is None or config.loop is None else {_of_loop(config.loop, "max_minutes"): minutes}


def _of_loop(scope: str, name: str) -> str:
    return f"{scope}/LoopConfig.{name}" if scope else f"LoopConfig.{name}"
