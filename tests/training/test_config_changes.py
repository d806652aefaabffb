import pytest

from training.config_changes import MAY_DIFFER, Setting, SettingChange, changed_settings, read_settings, settings_text


def settings(*triples):
    return [Setting(name, value, origin) for name, value, origin in triples]


def test_settings_are_a_config_and_come_back():
    given = settings(
        ("script.train.text", "'a # b = c'", "configs/my config.gin:3"),
        ("x/y/Outer.rate", "0.5", "default"),
        ("Outer.limit", "inf", "default"),
        ("Outer.root", "PosixPath('a  # b')", "default"),
    )
    text = settings_text(given)
    assert text.splitlines() == [
        "script.train.text = 'a # b = c'  # configs/my config.gin:3",
        "x/y/Outer.rate = 0.5  # default",
        "# Outer.limit = inf  # default",
        "# Outer.root = PosixPath('a  # b')  # default",
    ]
    assert read_settings(text) == given
    assert read_settings("# a heading\n\nhalf a line = 3") == []


def test_differences_are_listed_with_both_values_and_the_new_origin():
    before = settings(("a", "1", "default"), ("b", "2", "c.gin:1"), ("c", "3", "c.gin:2"))
    now = settings(("a", "1", "command line"), ("b", "5", "command line"), ("d", "'x'", "d.gin:9"))
    changes = changed_settings(before, now)
    assert changes == [
        SettingChange("b", "2", "5", "command line"),
        SettingChange("d", None, "'x'", "d.gin:9"),
        SettingChange("c", "3", None, None),
    ]
    assert [str(change) for change in changes] == [
        "b: 2 -> 5 (command line)",
        "d: not there -> 'x' (d.gin:9)",
        "c: 3 -> no longer there",
    ]


def test_a_default_that_one_side_lacks_is_no_difference_but_a_default_that_changed_is():
    before = settings(("gone", "1", "default"), ("default", "1", "default"))
    now = settings(("grown", "1", "default"), ("default", "2", "default"))
    assert [change.name for change in changed_settings(before, now)] == ["default"]


def test_a_default_that_is_written_as_its_address_is_no_difference():
    before = settings(("hook", "<function f at 0x1>", "default"), ("set", "<function f at 0x1>", "default"))
    now = settings(("hook", "<function f at 0x2>", "default"), ("set", "@g", "c.gin:1"))
    assert [change.name for change in changed_settings(before, now)] == ["set"]


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("train_decoder.train.save_dir_root", True),
        ("DatasetConfig.raw_dir", True),
        ("more/DatasetConfig.root", True),
        ("data.processed.DatasetConfig.root", True),
        ("DatasetConfig.seed", False),
        ("OtherConfig.root", False),
        ("train_rqvae.train.seed", False),
    ],
)
def test_what_may_differ(name, exempt):
    changes = changed_settings(settings((name, "1", "x")), settings((name, "2", "x")))
    assert bool(changes) != exempt


def test_the_exempt_settings_exist():
    import train_decoder  # noqa: F401  its import registers what configs may name
    from training import gin_registry

    for name in MAY_DIFFER:
        target, _, parameter = name.rpartition(".")
        for selector in gin_registry.matching("train_decoder.train" if target == "train" else target):
            assert parameter in gin_registry.parameters(selector)
