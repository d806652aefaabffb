"""What the files that others clone must not contain."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~:/$}-])/(?:work|root|home|Users|mnt|scratch)/\w")
REGISTRY = re.compile(
    r"(?:pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|(?:extra-)?index[-_]url|find-links|"
    r"trusted[-_]host|artifactory|devpi|nexus)",
    re.IGNORECASE,
)
PRIVATE_HOST = re.compile(r"https?://(?:10|172|192)[.]\d+[.]\d+[.]\d+")


@functools.cache
def tracked_files() -> list[Path]:
    """Files that are or would be in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are tracked is not known")
    paths = (REPOSITORY / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file()]  # a deleted file stays listed until the deletion is committed


def tracked_texts() -> list[tuple[str, str]]:
    """Name and content of every text file among them."""
    texts = []
    for path in tracked_files():
        try:
            texts.append((path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return texts


def found(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked_texts()
        if name != Path(__file__).relative_to(REPOSITORY).as_posix()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_some_machine():
    assert found(MACHINE_PATH) == []


def test_no_file_names_a_package_registry():
    assert found(REGISTRY) == []


def test_no_file_names_a_private_host():
    assert found(PRIVATE_HOST) == []


@pytest.mark.parametrize(
    ("pattern", "bad", "good"),
    [
        (MACHINE_PATH, "raw_dir = '/home/me/data'", "https://example.org/home/page and runs/home/x and $HOME/home/x"),
        (REGISTRY, "--extra-index-url https://example.org/simple", "see the selector on pytorch.org"),
        (PRIVATE_HOST, "http://10.0.0.7:8080/x", "http://127.0.0.1:8080/x"),
    ],
)
def test_the_patterns_find_what_they_should(pattern: re.Pattern[str], bad: str, good: str):
    assert pattern.search(bad)
    assert not pattern.search(good)


def test_nothing_large_is_tracked():
    """Data sets and checkpoints do not belong into a clone."""
    sizes = {path.relative_to(REPOSITORY).as_posix(): path.stat().st_size for path in tracked_files()}
    assert {name: size for name, size in sizes.items() if size > 10_000_000} == {}
