"""The settings of a run as lines of text, and how they differ from those of the run that it continues."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training.gin_syntax import is_value

DEFAULT = "default"
"""Origin of a value that nobody set."""

MAY_DIFFER = (
    "train.save_dir_root",
    "train.wandb_logging",
    "train.tensorboard_logging",
    "DatasetConfig.root",
    "DatasetConfig.raw_dir",
)
"""Settings that a run may change while it goes on: where things lie and who is told. None decides what is trained."""


@dataclass(frozen=True)
class Setting:
    """One parameter of the run: `name = value`.

    Attributes:
        name: complete, with its scopes.
        value: as a config file writes it.
        origin: where the value comes from: "FILE:LINE", "command line", or "default" if nobody set it.
        used_by: complete names of the training functions that the value reaches.
    """

    name: str
    value: str
    origin: str
    used_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class SettingChange:
    """A setting whose value is not what it was; None stands for a setting that there was not, or is no longer."""

    name: str
    before: str | None
    now: str | None
    origin: str | None

    def __str__(self) -> str:
        if self.now is None:
            return f"{self.name}: {self.before} -> no longer there"
        return f"{self.name}: {'not there' if self.before is None else self.before} -> {self.now} ({self.origin})"


def settings_text(settings: Iterable[Setting]) -> str:
    """Settings as a valid config, each line followed by the value's origin.

    What no config can write, such as an infinite default, is a comment.
    """
    lines = []
    for setting in settings:
        line = f"{setting.name} = {setting.value}  # {setting.origin}"
        lines.append(line if is_value(setting.value) else f"# {line}")
    return "".join(f"{line}\n" for line in lines)


def read_settings(text: str) -> list[Setting]:
    """Inverse of `settings_text`, but for `used_by`; lines that it did not write are left out."""
    settings = []
    for line in text.splitlines():
        name, equals, rest = line.removeprefix("# ").partition(" = ")
        value, mark, origin = rest.rpartition("  # ")
        if equals and mark:
            settings.append(Setting(name, value, origin))
    return settings


def changed_settings(before: Sequence[Setting], now: Sequence[Setting]) -> list[SettingChange]:
    """Every difference that decides what is trained.

    A setting that only one side knows, as when the library grew a parameter, is no difference at its default.
    """
    old = {setting.name: setting for setting in before}
    new = {setting.name: setting for setting in now}
    return [
        SettingChange(name, _value(old.get(name)), _value(new.get(name)), new[name].origin if name in new else None)
        for name in {**new, **old}
        if not _same(old.get(name), new.get(name)) and not _may_differ(name)
    ]


def _value(setting: Setting | None) -> str | None:
    return None if setting is None else setting.value


def _same(was: Setting | None, now_is: Setting | None) -> bool:
    known = [setting for setting in (was, now_is) if setting]
    if was and now_is and was.value == now_is.value:
        return True
    # A default such as a function is written as its address, <function f at 0x...>: that says nothing.
    silent = len(known) == 1 or any(setting.value.startswith("<") for setting in known)
    return silent and all(setting.origin == DEFAULT for setting in known)


def _may_differ(name: str) -> bool:
    """Whether a complete name such as train_rqvae.train.save_dir_root or x/DatasetConfig.root is exempt."""
    return name.rpartition("/")[2].split(".")[-2:] in [exempt.split(".") for exempt in MAY_DIFFER]
