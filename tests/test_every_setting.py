"""Every parameter of every shipped config: changed on the command line, it arrives where the program is called."""

import enum
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fit_baseline
import train_decoder
import train_rqvae
import train_sequence
from data.processed import RecDataset
from modules.estimators import QuantizeMode
from training import gin_registry
from training.gin_config import LoadedConfig, clear_config, load_config
from training.run_folder import RunOptions

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.gin") if path.parent.name != "base")
SCRIPTS = {
    "decoder": "train_decoder",
    "hstu": "train_sequence",
    "item": "fit_baseline",
    "liger": "train_decoder",
    "popularity": "fit_baseline",
    "random": "fit_baseline",
    "rqvae": "train_rqvae",
    "sasrec": "train_sequence",
    "tiger": "train_decoder",
    "user": "fit_baseline",
}
"""By the first word of a config's name."""

FUNCTIONS = {
    "fit_baseline.train": fit_baseline.train,
    "train_decoder.train": train_decoder.train,
    "train_rqvae.train": train_rqvae.train,
    "train_sequence.train": train_sequence.train,
}
SUPPLIED = {"options", "reuse_for"}
"""What the program itself hands to the functions."""

REQUIRED = {"tables": ["TablesConfig.interactions=log.csv", "TablesConfig.items=items.csv"]}
"""What users of a folder of configs have to name."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "DatasetConfig.dataset": (RecDataset.AMAZON, RecDataset.AMAZON_REVIEWS),
    "DatasetConfig.category": ("beauty", "toys"),
    "DatasetConfig.split": ("liger",),
    "HSTUConfig.dropout": (0.25,),
    "ItemKNNConfig.decay": (0.5,),
    "ItemInputConfig.hidden_dims": ((64, 32),),
    "ItemInputConfig.input_dropout": (0.25,),
    "LoopConfig.cuda_graphs": (False,),
    "LoopConfig.parameter_groups": ("(@group/ParameterGroup(),)",),
    "RetrievalModelConfig.items": ("@ItemInputConfig()",),
    "RetrievalModelConfig.languages": ({"text": (8, 8)},),
    "RqVaeConfig.activation": ("silu",),
    "RqVaeConfig.mode": (QuantizeMode.ROTATION_TRICK, QuantizeMode.STRAIGHT_THROUGH),
    "RqVaeConfig.restart_after": (0,),
    "RqVaeConfig.ema_decay": (0.0,),
    "RqVaeConfig.encoder": ("mlp", "skip"),
    "RqVaeConfig.hidden_dims": ((64, 32),),
    "SASRecConfig.dropout": (0.25,),
    "TablesConfig.text_columns": (("brand",),),
    "UserKNNConfig.decay": (0.5,),
    "train_decoder.train.features": ("@FeatureConfig()",),
    "train_decoder.train.modes": (("dense", "hybrid@all"),),
    "train_rqvae.train.more_datasets": ("(@more/DatasetConfig(),)",),
}
"""Valid values of settings whose type does not say them."""

APART = {"RqVaeConfig.ema_decay": 0.5, "RqVaeConfig.restart_after": 3, "RqVaeConfig.sinkhorn_epsilon": 0.25}
"""Valid values that do not go with other values of the settings beside them: changed in the second round."""

TABLES = {
    "DatasetConfig.dataset": RecDataset.TABLES,
    "DatasetConfig.category": None,
    "DatasetConfig.tables": "@TablesConfig()",
    "TablesConfig.interactions": "more.csv",
}
NO_TABLES = {
    "DatasetConfig.dataset": RecDataset.AMAZON,
    "DatasetConfig.category": "beauty",
    "DatasetConfig.tables": None,
}
"""Settings that belong together."""

MARKERS = {
    "FeatureConfig.encoder": "file",
    "HSTUConfig.d_model": 8,
    "ItemInputConfig.num_positions": 7,
    "ItemKNNConfig.num_neighbours": 7,
    "LoopConfig.num_steps": 7,
    "PopularityConfig.num_items": 7,
    "RandomConfig.num_items": 7,
    "RetrievalModelConfig.d_model": 8,
    "SASRecConfig.d_model": 8,
    "UserKNNConfig.num_neighbours": 7,
}
"""One setting of each other class for the second round, which sends every reference to another scope."""

SCOPE = "elsewhere"

REFERENCE = re.compile(r"@([\w/.]+)\(\)")
"""In the text of a value; not what a word such as hybrid@20 has."""

pytestmark = pytest.mark.parametrize("path", CONFIGS, ids=str)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    yield
    clear_config()


def load(path: Path, *overrides: str) -> LoadedConfig:
    given = [*REQUIRED.get(path.parent.name, []), *overrides]
    return load_config([path], given, script=script_of(path), supplied=["options"])


def script_of(path: Path) -> str:
    return SCRIPTS[path.stem.partition("_")[0]]


def tokenizer_config(path: Path) -> Path | None:
    """The RQ-VAE config that a config is, or includes, itself or by another, or None."""
    if path.stem.startswith("rqvae"):
        return path
    included = re.findall(r'^include "(\w+\.gin)"$', path.read_text(), flags=re.MULTILINE)
    return next(filter(None, (tokenizer_config(path.with_name(name)) for name in included)), None)


def arguments_of(train: Callable[..., Any]) -> dict[str, Any]:
    """What gin calls a training function with; it is stopped before its first line."""
    code = train.__wrapped__.__code__  # type: ignore[attr-defined]
    arguments: dict[str, Any] = {}

    def stop(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code:
            arguments.update(frame.f_locals)
            raise InterruptedError

    sys.setprofile(stop)
    try:
        train(options=RunOptions())
    except InterruptedError:
        return arguments
    finally:
        sys.setprofile(None)
    raise AssertionError("the function was not called")


def called(config: LoadedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and parameters of the functions, and of every object that a setting refers to."""
    written = {setting.name: setting.value for setting in config.settings}
    used = sorted({function for setting in config.settings for function in setting.used_by})
    pending = [(function, arguments_of(FUNCTIONS[function])) for function in used]
    while pending:
        owner, parameters = pending.pop()
        yield owner, parameters
        for name, value in parameters.items():
            references = REFERENCE.findall(written.get(f"{owner}.{name}", ""))
            for reference, found in zip(references, value if isinstance(value, tuple) else [value], strict=False):
                scopes = "" if "/" in reference else owner.rpartition("/")[0]
                pending.append((f"{scopes}/{reference}".lstrip("/"), vars(found)))


def arrived(config: LoadedConfig) -> dict[str, Any]:
    """What every parameter holds in the call, by its complete name."""
    return {
        f"{owner}.{name}": value
        for owner, parameters in called(config)
        for name, value in parameters.items()
        if name not in SUPPLIED
    }


def unscoped(name: str) -> str:
    return name.rpartition("/")[2]


def types_of(name: str) -> tuple[Any, ...]:
    """What the annotation of a parameter allows: the members of a union, the choices of a Literal."""
    target, _, parameter = unscoped(name).rpartition(".")
    annotation = gin_registry.annotation(gin_registry.matching(target)[0], parameter)
    return typing.get_args(annotation) or (annotation,)


def another(name: str, value: Any) -> Any:
    """A valid value of a parameter that is not this one."""
    types = types_of(name)
    named = tuple(choice for choice in types if isinstance(choice, str))
    for choice in CHOICES.get(unscoped(name), named):
        if choice != value:
            return choice
    if value is None:
        examples = {bool: True, str: "word", int: 7, float: 0.5, tuple[str, ...]: ("word",)}
        return next(examples[choice] for choice in types if choice in examples)
    return changed(value)


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, enum.Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, tuple):
        return tuple(map(changed, value))
    if isinstance(value, str):
        return f"{value}-2"
    return 2 * value or (1 if isinstance(value, int) else 0.5)


def text(value: Any) -> str:
    """A value as the command line takes it; references are written already."""
    return value if isinstance(value, str) and "@" in value else gin_registry.written(value)


def first_round(config: LoadedConfig, before: dict[str, Any]) -> dict[str, Any]:
    """Other values for all settings that go together; references stay."""
    apart = {name for name in APART if not before.get(name)}  # what is set can be put back to 0 with all others
    apart |= set(NO_TABLES if uses_tables(before) else ["DatasetConfig.tables"])
    values = {
        setting.name: another(setting.name, before[setting.name])
        for setting in config.settings
        if not REFERENCE.search(setting.value) and unscoped(setting.name) not in apart
    }
    trained = any(unscoped(name) == "LoopConfig.parameter_groups" for name in before)
    return values | ({"group/ParameterGroup.parameters": ("*.bias",)} if trained else {})


def second_round(config: LoadedConfig, before: dict[str, Any]) -> dict[str, Any]:
    """Every reference of the functions goes to a scope more, in which the other settings have values."""
    values: dict[str, Any] = {}
    others = {**APART, **MARKERS, **(NO_TABLES if uses_tables(before) else TABLES)}
    for setting in config.settings:
        if unscoped(setting.name) in others:
            owner = setting.name.rpartition("/")[0]
            values[f"{owner}/{SCOPE}/{unscoped(setting.name)}".lstrip("/")] = others[unscoped(setting.name)]
        elif setting.value.startswith("@") and setting.name.rpartition(".")[0] in FUNCTIONS:
            values[setting.name] = re.sub(r"@((?:\w+/)*)", rf"@\1{SCOPE}/", setting.value)
    if not uses_tables(before):
        values[f"{SCOPE}/TablesConfig.interactions"] = TABLES["TablesConfig.interactions"]
    return values


def uses_tables(values: dict[str, Any]) -> bool:
    return values["DatasetConfig.dataset"] is RecDataset.TABLES


def test_every_parameter_arrives_when_it_is_changed(path):
    config = load(path)
    before = arrived(config)
    unchanged = dict(before)
    for values in (first_round(config, before), second_round(config, before)):
        now = arrived(load(path, *(f"{name}={text(value)}" for name, value in values.items())))
        for name, value in values.items():
            assert now[name] == value or "@" in text(value), name
        for name, value in now.items():
            if unchanged.get(name := name.replace(f"{SCOPE}/", ""), value) != value:
                del unchanged[name]
    assert list(unchanged) == []


def test_the_printed_config_is_complete_and_gives_the_same_values(path, tmp_path):
    config = load(path)
    before = arrived(config)
    assert set(before) == {setting.name for setting in config.settings}
    (tmp_path / path.name).write_text(config.operative_config())
    again = load(tmp_path / path.name)
    assert arrived(again) == before
    assert [(setting.name, setting.value) for setting in again.settings] == [
        (setting.name, setting.value) for setting in config.settings
    ]


def test_every_origin_is_a_line_that_sets_the_parameter(path):
    settings = load(path).settings
    assert {setting.origin for setting in settings} > {"default"}
    for setting in settings:
        if setting.origin not in ("default", "command line"):
            file, _, number = setting.origin.rpartition(":")
            line = Path(file).read_text().splitlines()[int(number) - 1]
            assert line.startswith(f"{setting.name} = "), setting


def test_the_stage_of_the_tokenizer_has_the_settings_of_its_own_config(path):
    stage = RunOptions(settings=load(path).settings).of("train_rqvae").settings
    tokenizer = tokenizer_config(path)
    own = () if tokenizer is None else load(tokenizer).settings
    assert {(setting.name, setting.value, setting.origin) for setting in stage} == {
        (setting.name, setting.value, setting.origin) for setting in own
    }
