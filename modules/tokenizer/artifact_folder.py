"""Artifact folders: written whole or not at all, and verified when read."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data.files import file_sha256, replaced_folder
from data.schemas import InputError

MANIFEST = "manifest.json"


def write_artifact(folder: Path, kind: str, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside the target and rename it into place, so that the target is never half written.

    An artifact of the same kind is replaced; what was there stays when anything fails.

    Args:
        folder: the target.
        kind: as the manifest names it.
        write: writes all files, manifest.json with its "kind" among them, into the folder that it is given.

    Raises:
        InputError: if the target holds something else, or cannot be written.
    """
    folder = folder.expanduser().resolve()
    if not _is_replaceable(folder, kind):
        raise InputError(f"{folder} exists and is not a {kind}. Choose another folder, or remove this one yourself.")
    with replaced_folder(folder) as temporary:
        write(temporary)


def _is_replaceable(folder: Path, kind: str) -> bool:
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if (folder / MANIFEST).is_file():
        try:
            return read_json(folder / MANIFEST).get("kind") == kind
        except InputError:
            return False
    return not any(folder.iterdir())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: if the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Check the path, or copy the artifact again.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}). Copy or build the artifact again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} expected a JSON object, got {type(content).__name__}. Copy the artifact again.")
    return content


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, by their name inside the folder."""
    return {name: file_sha256(folder / name) for name in names}


def read_manifest(folder: Path, kind: str, format_version: int, names: Iterable[str]) -> dict[str, Any]:
    """The manifest of an artifact whose kind, format version and files have been verified.

    Args:
        folder: of the artifact.
        kind: expected.
        format_version: the newest that can be read.
        names: files that `verify_files` checks.

    Raises:
        InputError: if the folder is no such artifact, its format is newer, or a file is missing or altered.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is not a {kind}: it has no {MANIFEST}. Check the path.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != kind:
        raise InputError(f"{folder} expected a {kind}, got a {manifest.get('kind') or 'folder of another kind'}.")
    version = manifest.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= format_version:
        raise InputError(
            f"{folder} has format version {version}, but this library reads 1..{format_version}. Update the library, "
            "or export the artifact again."
        )
    verify_files(folder, manifest, names)
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Compare files with the hashes in the manifest.

    Raises:
        InputError: naming the first that is missing or altered, or that the manifest does not list.
    """
    expected = manifest.get("files")
    for name in names:
        if not isinstance(expected, dict) or name not in expected:
            raise InputError(f"{folder / MANIFEST} has no hash of {name}. Copy or build the artifact again.")
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not whole: {name} is missing. Copy or build the artifact again.")
        if file_hashes(folder, [name])[name] != expected[name]:
            raise InputError(f"{folder / name} is damaged: its SHA-256 is not the manifest's. Copy the artifact again.")
