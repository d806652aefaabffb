import enum
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gin
import pytest

from data.schemas import InputError
from tests.training import gin_worker
from training.gin_config import clear_config, config_in_force, load_config, plain_message, register


class Flavour(enum.Enum):
    SWEET = 1
    SOUR = 2


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    levels: dict[str, tuple[int, ...]] | None = None
    flavour: Flavour = Flavour.SWEET
    kind: Literal["plain", "fancy"] = "plain"
    inner: Inner | None = None
    path: Path | None = None


register(Inner, Outer, Flavour)


@gin.configurable(module="script_one")
def train(
    *,
    options: object,
    seed: int = 0,
    flag: bool = False,
    outer: Outer | None = None,
    other: Outer | None = None,
    text: str = "",
    make: Callable[..., Inner] | None = None,
) -> dict[str, object]:
    return {"seed": seed, "flag": flag, "outer": outer, "other": other, "text": text, "make": make}


train_one = train


@gin.configurable("train", module="script_two")
def train_two(*, options: object, seed: int = 0, required: str) -> tuple[int, str]:
    return seed, required


@gin.configurable(module="script_three")
def fails(message: str = "") -> None:
    raise InputError("plain words")


@pytest.fixture(autouse=True)
def _clean():
    yield
    clear_config()


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides, script="script_one"):
        (tmp_path / "c.gin").write_text(text)
        return load_config(["c.gin"], overrides, script=script, supplied=["options"])

    return load


def refused(load, text, *overrides, script="script_one"):
    with pytest.raises(InputError) as caught:
        load(text, *overrides, script=script)
    return str(caught.value)


def values():
    return train_one(options=None)


# What works


def test_values_references_scopes_macros_and_constants_arrive(load):
    load(
        """
        width = 7
        train.seed = 3
        train.flag = True
        train.outer = @Outer()
        train.other = @second/Outer()
        Outer.rate = 2
        Outer.sizes = [4, %width]
        second/Outer.rate = 0.25
        second/Outer.flavour = %Flavour.SOUR
        second/Outer.inner = @Inner()
        Inner.size = %width
        second/Inner.name = 'deep'
        Outer.levels = {'text': [8, 8], 'image': (4,)}
        Outer.path = 'a/b'
        train.make = @Inner
        """
    )
    result = values()
    assert (result["seed"], result["flag"]) == (3, True)
    assert result["outer"] == Outer(rate=2.0, sizes=(4, 7), levels={"text": (8, 8), "image": (4,)}, path=Path("a/b"))
    assert type(result["outer"].rate) is float
    assert (result["other"].rate, result["other"].flavour) == (0.25, Flavour.SOUR)
    assert result["other"].inner == Inner(size=7, name="deep")
    assert result["make"](name="by hand") == Inner(size=7, name="by hand")


def test_bare_train_means_the_running_scripts_function(load):
    load("train.seed = 5\ntrain.required = 'x'", "train.seed=6", script="script_two")
    assert train_two(options=None) == (6, "x")
    assert values()["seed"] == 0
    load("train.seed = 5\nscript_two.train.seed = 9")
    assert values()["seed"] == 5
    assert train_two(options=None, required="y") == (9, "y")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("word", "word"),
        ("two words", "two words"),
        ("runs/beauty-1", "runs/beauty-1"),
        ("5-core", "5-core"),
        ("2024-01-01", "2024-01-01"),
        ("-abc", "-abc"),
        ("", ""),
        ("a=b", "a=b"),
        ("'quoted'", "quoted"),
        ('"%macro"', "%macro"),
        ("it's", "it's"),
    ],
)
def test_overrides_read_words_as_strings(load, written, expected):
    config = load("", f"train.text={written}")
    assert values()["text"] == expected
    load(config.text)
    assert values()["text"] == expected


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("train.seed=-4", "seed", -4),
        ("train.seed=%n", "seed", 8),
        ("train.flag=True", "flag", True),
        ("train.outer=None", "outer", None),
        ("train.other=@Outer()", "other", Outer(rate=1e-3)),
    ],
)
def test_overrides_read_gin_values(load, override, name, expected):
    load("n = 8\ntrain.text = %t\nt = 'used'\ntrain.outer = @Outer()\nOuter.rate = 1e-3\ntrain.seed = %n", override)
    assert values()[name] == expected


def test_includes_are_relative_to_their_file_and_later_values_win(tmp_path, monkeypatch):
    (tmp_path / "configs/base").mkdir(parents=True)
    (tmp_path / "configs/base/inner.gin").write_text("train.seed = 1\ntrain.text = 'inner'\n")
    (tmp_path / "configs/base/outer.gin").write_text("include 'inner.gin'\ntrain.seed = 2")
    (tmp_path / "configs/run.gin").write_text("include 'base/outer.gin'\ntrain.flag = True\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(["configs/run.gin"], ["train.seed=3"], script="script_one", supplied=["options"])
    assert (values()["seed"], values()["text"], values()["flag"]) == (3, "inner", True)
    origins = {setting.name: setting.origin for setting in config.settings}
    assert origins["script_one.train.text"] == "configs/base/inner.gin:2"
    assert origins["script_one.train.flag"] == "configs/run.gin:2"
    assert origins["script_one.train.seed"] == "command line"
    assert origins["script_one.train.other"] == "default"
    (tmp_path / "flat.gin").write_text(config.text)
    load_config(["flat.gin"], [], script="script_one", supplied=["options"])
    assert (values()["seed"], values()["text"], values()["flag"]) == (3, "inner", True)


def test_operative_config_is_a_config_that_gives_the_same_values(load):
    config = load(
        "train.outer = @big/Outer()\nbig/Outer.flavour = %Flavour.SOUR\nbig/Outer.sizes = (3,)\n"
        'big/Outer.inner = @Inner()\nInner.size = 4\ntrain.text = "it\'s"'
    )
    before = values()
    text = config.operative_config()
    assert "big/Outer.rate = 0.5  # default\n" in text
    assert "big/Outer.flavour = %Flavour.SOUR  # c.gin:2\n" in text
    assert "script_one.train.outer = @big/Outer()  # c.gin:1\n" in text
    again = load(text)
    assert values() == before
    assert [(s.name, s.value) for s in again.settings] == [(s.name, s.value) for s in config.settings]


def test_enum_defaults_are_written_as_constants(load):
    assert "Outer.flavour = %Flavour.SWEET  # default\n" in load("train.outer = @Outer()").operative_config()


def test_a_default_that_is_made_anew_for_each_object_is_written_as_its_value(load):
    @dataclass(frozen=True)
    class Made:
        names: dict[str, int] = field(default_factory=lambda: {"a": 1})

    register(Made)
    text = load("train.make = @Made").operative_config()
    assert "Made.names = {'a': 1}  # default\n" in text


def test_the_origin_of_a_value_names_the_macros_in_it(load):
    config = load("WIDTH = 3\ntrain.seed = %SEED\nSEED = %WIDTH\ntrain.text = %TEXT\nTEXT = 'a'", "TEXT=b")
    origins = {setting.name: setting.origin for setting in config.settings}
    assert origins["script_one.train.seed"] == "c.gin:2, %SEED from c.gin:3, %WIDTH from c.gin:1"
    assert origins["script_one.train.text"] == "c.gin:4, %TEXT from command line"


def test_settings_name_the_functions_that_they_reach(load):
    config = load("train.outer = @a/Outer()\na/Outer.rate = 1.0\nscript_two.train.required = 'x'\ntrain.seed = 1")
    users = {setting.name: setting.used_by for setting in config.settings}
    assert users["a/Outer.rate"] == users["script_one.train.flag"] == ("script_one.train",)
    assert users["script_two.train.required"] == ("script_two.train",)


def test_a_spawned_process_applies_the_config(load):
    config = load("WIDTH = 7\ntrain.seed = %WIDTH", "train.name=it's # no comment", script=gin_worker.__name__)
    assert config_in_force() is config
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=config.apply) as pool:
        assert pool.submit(gin_worker.arguments).result(timeout=120) == (7, "it's # no comment")
    clear_config()
    assert config_in_force() is None
    config.apply(3)  # the number that a DataLoader gives its worker
    assert gin_worker.arguments() == (7, "it's # no comment")
    assert config_in_force().settings[0].value == "7"


def test_loading_again_forgets_the_first_config(load):
    load("train.seed = 3")
    load("train.flag = True")
    assert values()["seed"] == 0


def test_overriding_a_reference_away_leaves_its_settings_harmless(load):
    load("train.outer = @Outer()\nOuter.rate = 1.0", "train.outer=None")
    assert values()["outer"] is None


def test_macros_take_overrides_and_required_ones_are_satisfied(load):
    load("SEED = %gin.REQUIRED\ntrain.seed = %SEED", "SEED=12")
    assert values()["seed"] == 12


def test_imports_run_and_missing_ones_are_named(load):
    load("import json\nfrom os import path\ntrain.seed = 1")
    assert refused(load, "\nimport no_such_module") == (
        "c.gin:2: cannot import no_such_module (No module named 'no_such_module'). Remove the line."
    )


def test_register_twice_is_harmless():
    register(Inner, Flavour)
    load_config([], ["train.outer=@Outer()", "Outer.flavour=%Flavour.SOUR"], script="script_one", supplied=["options"])
    assert values()["outer"].flavour is Flavour.SOUR


def test_gin_appends_nothing_to_plain_messages():
    with pytest.raises(InputError) as caught:
        fails()
    assert "In call to configurable" in str(caught.value)
    assert plain_message(caught.value) == "plain words"


# What is refused, with the whole message


def test_unknown_configurable(load):
    message = refused(load, "\ntrian.seed = 3")
    assert message.startswith("c.gin:2: nothing configurable is called trian. Did you mean train? Valid: ")
    assert "Outer" in message
    assert refused(load, "train.outer = @Outre()").startswith(
        "c.gin:1: nothing configurable is called Outre (in train.outer). Did you mean Outer? Valid: "
    )


def test_unknown_parameter(load):
    assert refused(load, "train.outer = @Outer()\n# comment\nOuter.raet = 1.0") == (
        "c.gin:3: Outer has no parameter raet. Did you mean rate? "
        "Valid: rate, sizes, levels, flavour, kind, inner, path."
    )
    assert refused(load, "", "train.sed=1").startswith(
        "command line: script_one.train has no parameter sed. Did you mean seed? Valid: seed, flag,"
    )


def test_parameter_that_the_program_sets(load):
    assert refused(load, "train.options = 3") == (
        "c.gin:1: train.options is set by the program, not by configs. Remove it."
    )


def test_unused_scope(load):
    assert refused(load, "train.outer = @big/Outer()\nbgi/Outer.rate = 1.0") == (
        "c.gin:2: bgi/Outer.rate has no effect: nothing refers to @bgi/Outer(). Did you mean big? Scopes in use: big."
    )


def test_settings_of_something_nobody_refers_to(load):
    assert refused(load, "Outer.rate = 1.0") == (
        "c.gin:1: Outer.rate has no effect: nothing refers to @Outer(). Write train.NAME = @Outer()."
    )


def test_an_override_that_scoped_values_hide(load):
    text = "train.outer = @big/Outer()\ntrain.other = @small/Outer()\nbig/Outer.rate = 1.0\nsmall/Outer.rate = 2.0"
    assert refused(load, text, "Outer.rate=3.0") == (
        "command line: Outer.rate has no effect: c.gin:3 sets big/Outer.rate. "
        "Write --gin.big/Outer.rate=VALUE or --gin.small/Outer.rate=VALUE."
    )
    load("train.outer = @big/Outer()\ntrain.other = @small/Outer()\nbig/Outer.rate = 1.0", "Outer.rate=3.0")
    assert (values()["outer"].rate, values()["other"].rate) == (1.0, 3.0)


def test_undefined_and_unused_macros(load):
    assert refused(load, "sede = 3\ntrain.seed = %seed\ntrain.text = %sede") == (
        "c.gin:2: train.seed uses %seed, which is not defined. Did you mean %sede? Define it: seed = VALUE."
    )
    assert refused(load, "train.flag = True", "train_seed=3") == (
        "command line: nothing uses the macro train_seed. Did you mean train.seed? Use it as %train_seed, "
        "or name a parameter (train.train_seed)."
    )
    assert refused(load, "WIDTH = 3\ntrain.seed = %WIDTH", "WIDHT=4").startswith(
        "command line: nothing uses the macro WIDHT. Did you mean WIDTH? "
    )
    assert refused(load, "a = %b\nb = %a\ntrain.seed = %a").endswith(" is defined by itself.")


def test_required_values(load):
    assert refused(load, "\ntrain.seed = %gin.REQUIRED") == (
        "c.gin:2: train.seed is required. Set it: --gin.train.seed=VALUE."
    )
    assert refused(load, "SEED = %gin.REQUIRED\ntrain.seed = %SEED") == (
        "c.gin:1: SEED is required. Set it: --gin.SEED=VALUE."
    )
    assert refused(load, "train.seed = 1", script="script_two") == (
        "config: train.required (str) has no value. Set it in the config or with --gin.train.required=VALUE."
    )
    assert refused(load, "train.outer = @big/Outer()\nbig/Outer.inner = @Inner()") == (
        "config: big/Inner.size (int) has no value. Set it in the config or with --gin.big/Inner.size=VALUE."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.seed = True", "train.seed expected int, got True (bool)."),
        ("train.seed = 1.0", "train.seed expected int, got 1.0 (float)."),
        ("train.seed = '1'", "train.seed expected int, got '1' (str)."),
        ("train.seed = None", "train.seed expected int, got None."),
        ("train.flag = 1", "train.flag expected bool, got 1 (int)."),
        ("train.text = 5", "train.text expected str, got 5 (int)."),
        ("n = 'x'\ntrain.seed = %n", "train.seed expected int, got 'x' (str)."),
        (
            "train.outer = @Outer",
            "train.outer expected Outer | None, got @Outer. Write @Outer().",
        ),
        (
            "train.outer = {'rate': 1.0}",
            "train.outer expected Outer | None, got {'rate': 1.0} (dict). "
            "Write @Outer() and set its fields as Outer.FIELD = VALUE.",
        ),
        (
            "train.outer = @Inner()\nInner.size = 1",
            "train.outer expected Outer | None, got @Inner(). "
            "Write @Outer() and set its fields as Outer.FIELD = VALUE.",
        ),
    ],
)
def test_wrong_types_of_the_function(load, text, message):
    assert refused(load, text).split(": ", 1)[1] == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rate = 'fast'", "Outer.rate expected float, got 'fast' (str)."),
        ("rate = True", "Outer.rate expected float, got True (bool)."),
        ("sizes = 3", "Outer.sizes expected tuple[int, ...], got 3 (int)."),
        ("sizes = (1, 'a')", "Outer.sizes expected tuple[int, ...], got (1, 'a') (tuple)."),
        (
            "levels = {'text': 3}",
            "Outer.levels expected dict[str, tuple[int, ...]] | None, got {'text': 3} (dict).",
        ),
        (
            "flavour = 'SOUR'",
            "Outer.flavour expected Flavour, got 'SOUR' (str). Write one of: %Flavour.SWEET, %Flavour.SOUR.",
        ),
        ("kind = 'fance'", "Outer.kind expected Literal['plain', 'fancy'], got 'fance' (str)."),
        ("path = 3", "Outer.path expected Path | None, got 3 (int)."),
    ],
)
def test_wrong_types_of_a_dataclass(load, setting, message):
    assert refused(load, f"train.outer = @Outer()\nOuter.{setting}") == f"c.gin:2: {message}"


def test_files_that_are_missing_or_circular(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.gin").write_text("include 'basse.gin'\n")
    Path("base.gin").write_text("include 'loop.gin'\n")
    Path("loop.gin").write_text("\ninclude 'base.gin'\n")
    with pytest.raises(
        InputError, match=r"^command line: config file dmo.gin does not exist. Did you mean demo.gin\?$"
    ):
        load_config(["dmo.gin"], [], script="script_one")
    with pytest.raises(
        InputError, match=r"^demo.gin:1: config file basse.gin does not exist. Did you mean base.gin\?$"
    ):
        load_config(["demo.gin"], [], script="script_one")
    with pytest.raises(InputError, match=r"^loop.gin:2: base.gin includes itself"):
        load_config(["base.gin"], [], script="script_one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.seed = 1\ntrain.text = word", r"^c.gin:2: not a valid config line \(Failed to parse token 'word'\)"),
        ("train.seed 3", r"^c.gin:1: not a valid config line"),
        ("train.text = (1,\n", r"^c.gin:\d: "),
        ("train.seed = 1 2", r"^c.gin:1: not a valid config line \(Expected newline\)"),
    ],
)
def test_lines_that_gin_cannot_read(load, text, message):
    with pytest.raises(InputError, match=message):
        load(text)


def test_overrides_that_cannot_be_read(load):
    assert refused(load, "", "train.seed=(1, 2") == (
        "command line: (1, 2 is not a valid value; check its brackets and quotes."
    )
    assert refused(load, "", "train..seed=1") == ("command line: expected --gin.NAME=VALUE, got --gin.train..seed=1.")


def test_ambiguous_names(load):
    gin.external_configurable(Inner, name="Twin", module="left")
    gin.external_configurable(Outer, name="Twin", module="right")
    assert refused(load, "train.outer = @Twin()") == (
        "c.gin:1: Twin is ambiguous; write one of: left.Twin, right.Twin."
    )
