"""Raw files on this machine: found in a local folder, or downloaded with progress, checks and resume."""

import gzip
import http.client
import logging
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from data.files import exclusive, file_sha256
from data.schemas import InputError
from data.sources.base import RawFile, Source

_CHUNK = 1 << 20
_ATTEMPTS = 4
_TIMEOUT_SECONDS = 30
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"

_logger = logging.getLogger(__name__)


def find_raw_folder(source: Source, *bases: Path | None) -> Path | None:
    """The first local folder that holds all required raw files; None when there is none.

    Looked in are the bases in turn, such as raw_dir and cache_dir, and in each the source's own sub-folders first.
    """
    return next((folder for folder in _folders(source, *bases) if not _lacking(source, folder)), None)


def ensure_raw_files(source: Source, raw_dir: Path | None, cache_dir: Path) -> Path:
    """A folder with the source's raw files: a local one, or `cache_dir` after downloading what is missing.

    `raw_dir` is only read. An archive that a person has put into `raw_dir` or `cache_dir` is not downloaded again.

    Raises:
        InputError: if a file is missing and cannot be fetched, or is a Git-LFS pointer, empty, or damaged. The
            message says where the files come from and where to put them.
    """
    if raw_dir is not None and not raw_dir.is_dir():
        raise InputError(
            f"raw_dir {raw_dir} is not a folder. Give the folder that holds the raw files of {source.name}."
        )
    folder = find_raw_folder(source, raw_dir, cache_dir)
    if folder is None:
        _fetch_missing(source, raw_dir, cache_dir)
        folder = cache_dir
    for path in filter(None, (file.find(folder) for file in source.raw_files())):
        _check_is_data(path)
    return folder


def fetch(url: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> None:
    """Downloads a file through `target`.part, which a later call resumes; `target` appears only when it is whole.

    Raises:
        InputError: if the server cannot be reached or what came is not what was expected.
    """
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _transfer_with_retries(url, part)
    problem = _problem(part, target.name, sha256, size)
    if problem and resumed:  # the part may stem from another version of the file
        part.unlink()
        _transfer_with_retries(url, part)
        problem = _problem(part, target.name, sha256, size)
    if problem:
        part.unlink()
        raise InputError(f"{url}: {problem}. What came was deleted; try again.")
    part.replace(target)


def _folders(source: Source, *bases: Path | None) -> list[Path]:
    """Where raw files may lie."""
    return [base / sub for base in bases if base is not None for sub in (*source.local_folders, ".")]


def _lacking(source: Source, folder: Path) -> list[RawFile]:
    """Required raw files that a folder does not hold."""
    return [file for file in source.raw_files() if not file.optional and not file.find(folder)]


def _bases(raw_dir: Path | None, cache_dir: Path) -> list[Path]:
    return [cache_dir] if raw_dir is None else [raw_dir, cache_dir]


def _fetch_missing(source: Source, raw_dir: Path | None, cache_dir: Path) -> None:
    missing = [file for file in source.raw_files() if not file.find(cache_dir)]
    by_hand = [file for file in missing if file.url is None and not file.optional]
    if by_hand:
        raise _manual_error(source, by_hand, raw_dir, cache_dir, "cannot be downloaded by themselves")
    with exclusive(cache_dir):
        cache_dir.mkdir(exist_ok=True)
        for file in missing:
            if file.url is None or file.find(cache_dir):
                continue
            try:
                _fetch_one(file, _bases(raw_dir, cache_dir), cache_dir)
            except InputError as error:
                if file.optional:
                    _logger.warning("%s: going on without %s: %s", source.name, file.name, error)
                else:
                    raise _manual_error(source, [file], raw_dir, cache_dir, str(error)) from error
            except OSError as error:
                raise _manual_error(source, [file], raw_dir, cache_dir, f"cannot be written: {error}") from error


def _fetch_one(file: RawFile, bases: Iterable[Path], cache_dir: Path) -> None:
    assert file.url is not None
    name = file.url.rsplit("/", 1)[-1]
    if file.member is None:
        fetch(file.url, cache_dir / file.name, sha256=file.sha256, size=file.size)
        return
    archive = next((base / name for base in bases if (base / name).is_file()), None)
    if archive is None:
        archive = cache_dir / name
        fetch(file.url, archive, sha256=file.sha256, size=file.size)
    _extract(archive, file.member, cache_dir / file.name)


def _extract(archive: Path, member: str, target: Path) -> None:
    """Writes one named member to `target`; no other path of the archive is ever used."""
    part = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
    except KeyError as error:
        raise InputError(f"{archive} lacks {member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive} is truncated or damaged ({error}); delete it") from error
    part.replace(target)


def _transfer_with_retries(url: str, part: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            _transfer(url, part)
            return
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if refused or attempt == _ATTEMPTS - 1:
                raise InputError(f"{url} could not be downloaded ({error})") from error
            time.sleep(0.5 * 2**attempt)


def _transfer(url: str, part: Path) -> None:
    """Appends to `part` what it still lacks; ConnectionError when the stream ends early."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "generative-retrieval-data/1"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # nothing is left to send; the checks decide whether the part is whole
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=f"downloading {part.stem}")
        with bar, part.open("ab" if have else "wb") as sink:
            while chunk := response.read(_CHUNK):
                sink.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"connection lost after {part.stat().st_size} of {total} bytes")


def _problem(part: Path, name: str, sha256: str | None, size: int | None) -> str | None:
    """What is wrong with a downloaded file, or None."""
    got = part.stat().st_size
    if size is not None and got != size:
        return f"expected {size} bytes, got {got}"
    if sha256 is not None and (digest := file_sha256(part)) != sha256:
        return f"expected sha256 {sha256}, got {digest}"
    if name.endswith(".gz"):
        try:
            with gzip.open(part) as stream:
                while stream.read(_CHUNK):
                    pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            return f"not a whole gzip file ({error})"
    if name.endswith(".zip") and not zipfile.is_zipfile(part):
        return "not a whole zip file"
    return None


def _check_is_data(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_LFS_HEADER))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}).") from error
    if head == _LFS_HEADER:
        raise InputError(f"{path} is a Git-LFS pointer, not the data. Run `git lfs pull` where it came from.")
    if not head:
        raise InputError(f"{path} is empty. Fetch it again.")


def _manual_error(source: Source, files: list[RawFile], raw_dir: Path | None, cache_dir: Path, why: str) -> InputError:
    fullest = min(_folders(source, *_bases(raw_dir, cache_dir)), key=lambda folder: len(_lacking(source, folder)))
    present = [file for file in files if file.find(fullest)]
    names = ", ".join(file.name for file in files if file not in present)
    folders = ", ".join(str(base) for base in _bases(raw_dir, cache_dir))
    origin = source.origin or ", ".join(sorted({file.url for file in files if file.url}))
    come_from = f" They come from {origin}." if origin else ""
    place = f"Put them into {cache_dir} or set DatasetConfig.raw_dir to the folder that holds them."
    if present:
        place = f"All must lie in one folder: put them into {fullest}, or all of them into {cache_dir}."
    return InputError(
        f"{source.name}: raw files are missing: {names} (looked in {folders}); {why.rstrip('. ')}.{come_from} {place}"
    )
