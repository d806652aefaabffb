"""Artifacts on the Hugging Face Hub: one call that turns a folder or a Hub id into a local folder, and uploading."""

import re
from pathlib import Path

from data.schemas import InputError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)

_FILES = ["*.json", "*.safetensors", "*.md"]
"""What artifacts consist of; nothing else is downloaded, so no pickle reaches the machine."""


def resolve_folder(folder_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """Local folder of an artifact, downloaded into the Hub cache when it is not a folder already.

    A folder of that name wins over a Hub repository.

    Args:
        folder_or_hub_id: path of a folder, or "owner/name" on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if there is neither such a folder nor such a repository, or the Hub cannot be reached and the
            repository is not in the cache.
    """
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{folder} is a local folder, so revision={revision!r} cannot apply. Leave it out.")
        return folder
    hub_id = str(folder_or_hub_id)
    if folder.exists() or hub_id.startswith(".") or not _HUB_ID.fullmatch(hub_id):
        raise InputError(f"{hub_id} is not a folder, nor a Hub id of the form owner/name. Check the path.")
    return _download(hub_id, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"Hub repository {hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_FILES))
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{where}: there is no such revision. Check the name of the branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"no folder {hub_id!r} here, and {where} does not exist or is private. Check the spelling, or log in with "
            "`hf auth login`."
        ) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"no folder {hub_id!r} here, and {where} could not be downloaded ({_first_line(error)}). Go online once to "
            "fill the cache, or copy the repository into a folder and give its path."
        ) from error


def upload_folder(folder: Path, repo_id: str, *, private: bool = False, message: str) -> str:
    """Create the Hub model repository if needed and upload a folder into it.

    Args:
        folder: what to upload, whole.
        repo_id: "owner/name".
        private: hide a repository that is created; otherwise its owner's default holds.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        InputError: if the Hub refuses or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except (errors.HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"upload to Hub repository {repo_id!r} failed ({_first_line(error)}). Log in with `hf auth login` as a "
            "user who may write there, and check the connection."
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
